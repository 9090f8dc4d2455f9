// Charts. Each has a sentence for screen readers and its numbers as a table.

import { html, useEffect, useRef } from "./preact.js";
import { total } from "./store.js";
import { clock, rate } from "./words.js";

// A line of 60 rates without axes.
export function Sparkline({ rates, label }) {
  const totals = (rates ?? []).map(total);
  const most = Math.max(1, ...totals.filter((sum) => sum !== undefined));
  const point = (sum, index) => (sum === undefined ? undefined : `${index * 2},${(20 - (sum / most) * 18).toFixed(1)}`);
  const points = totals.map(point).filter(Boolean).join(" ");
  return html`<svg class="spark" viewBox="0 0 120 22" role="img" aria-label=${label}>
    <polyline points=${points} />
  </svg>`;
}

let library;

// Loads uPlot when the first chart is shown.
function load() {
  library ??= new Promise((resolve, reject) => {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: "uplot.css" });
    const script = Object.assign(document.createElement("script"), { src: "uplot.js" });
    script.onload = () => resolve(window.uPlot);
    script.onerror = () => {
      library = undefined;
      reject(new Error("uplot.js cannot be loaded"));
    };
    document.head.append(style, script);
  });
  return library;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const HEIGHT = 180;
const SPAN_S = 300;

// `data`: seconds since 1970, and then the values of each series. `series`: a label and the CSS variable of its colour.
export function Chart({ title, unit, data, series, sentence }) {
  const place = useRef(null);
  const chart = useRef(null);
  useEffect(() => {
    let isGone = false;
    const width = () => Math.max(240, place.current?.clientWidth ?? 240);
    const draw = (uPlot) => {
      if (isGone) {
        return;
      }
      const axis = { stroke: () => color("--soft"), grid: { stroke: () => color("--line"), width: 1 }, ticks: { show: false } };
      chart.current = new uPlot(
        {
          width: width(),
          height: HEIGHT,
          legend: { show: false },
          cursor: { show: false },
          scales: {
            x: { range: (plot) => [plot.data[0].at(-1) - SPAN_S, plot.data[0].at(-1)] },
            y: { range: (_, low, high) => [0, Math.max(1, high * 1.1)] },
          },
          axes: [{ ...axis, values: (_, times) => times.map((time) => clock(time * 1000)), space: 90 }, { ...axis, size: 46 }],
          series: [
            {},
            ...series.map((line) => ({ label: line.label, stroke: () => color(line.color), width: 2, dash: line.dash, points: { show: false } })),
          ],
        },
        data,
        place.current,
      );
    };
    // Without the library, the table is there.
    load().then(draw, () => {});
    const resized = new ResizeObserver(() => chart.current?.setSize({ width: width(), height: HEIGHT }));
    resized.observe(place.current);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => chart.current?.redraw();
    scheme.addEventListener("change", redraw);
    return () => {
      isGone = true;
      resized.disconnect();
      scheme.removeEventListener("change", redraw);
      chart.current?.destroy();
      chart.current = null;
    };
  }, [title]);
  useEffect(() => chart.current?.setData(data));
  const last = data[0].slice(-12);
  return html`<figure class="chart">
    <figcaption>
      ${title}
      <span class="legend">
        ${series.map((line) => html`<span key=${line.label}><i style=${{ background: `var(${line.color})` }} /> ${line.label}</span>`)}
      </span>
    </figcaption>
    <div ref=${place} role="img" aria-label=${sentence}></div>
    <details>
      <summary>As a table</summary>
      <table class="plain">
        <caption class="hidden">${title}</caption>
        <thead>
          <tr><th scope="col">Time</th>${series.map((line) => html`<th scope="col" key=${line.label}>${line.label}${unit}</th>`)}</tr>
        </thead>
        <tbody>
          ${last.map((time, index) => {
            const place = data[0].length - last.length + index;
            return html`<tr key=${time}>
              <th scope="row">${clock(time * 1000)}</th>
              ${series.map((line, number) => html`<td key=${line.label}>${rate(data[number + 1][place] ?? undefined)}</td>`)}
            </tr>`;
          })}
        </tbody>
      </table>
    </details>
  </figure>`;
}
