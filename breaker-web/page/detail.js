// One breaker: what failed, since when, who is affected, what breaker does, and the commands.

import { html, useEffect, useRef, useState } from "./preact.js";
import { Chart } from "./charts.js";
import { EventList } from "./events.js";
import { Head, Problems, Share, State, Ups } from "./parts.js";
import { get } from "./stream.js";
import { ago, clock, count, doing, milliseconds, overrideWords, percent, rate } from "./words.js";

const POLL_MS = 2000;
const MOST_TIMES = 150;
const MOST_EVENTS = 50;

// Fetches a path now and every two seconds, until another path is wanted. Returns the last answer or an error.
function usePolled(path) {
  const [state, setState] = useState({});
  useEffect(() => {
    setState({});
    if (!path) {
      return undefined;
    }
    const ended = new AbortController();
    const poll = async () => {
      while (!ended.signal.aborted) {
        try {
          const value = await get(path, ended.signal);
          setState({ path, value });
        } catch (error) {
          if (!ended.signal.aborted) {
            setState((old) => ({ ...old, path, error: error.message }));
          }
        }
        await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      }
    };
    poll();
    return () => ended.abort();
  }, [path]);
  return state.path === path ? state : {};
}

function Copy({ text, purpose }) {
  const [copied, setCopied] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setCopied("Copied");
    } catch {
      setCopied("Select and copy it by hand");
    }
    setTimeout(() => setCopied(""), 3000);
  };
  return html`<button type="button" onClick=${copy} aria-label="Copy the command: ${purpose}">Copy</button> <span role="status">${copied}</span>`;
}

function Commands({ commands }) {
  return html`<h2>Commands</h2>
    <dl class="commands">
      ${commands.map(
        ({ purpose, line }) => html`<div key=${line}>
          <dt>${purpose}</dt>
          <dd><code>${line}</code> <${Copy} text=${line} purpose=${purpose} /></dd>
        </div>`,
      )}
    </dl>`;
}

function Backends({ service, now }) {
  const rows = service.tiers.flatMap((tier) => tier.backends.map((backend) => ({ tier, backend })));
  if (rows.length === 0) {
    return html`<p class="empty">No tier has pods.</p>`;
  }
  return html`<table class="plain backends">
    <${Head} columns=${["Tier", "Address", "Health", "For", "Last check", "Took", "Details"]} />
    <tbody>
      ${rows.map(
        ({ tier, backend }) => html`<tr key=${tier.name + backend.address}>
          <td data-label="Tier">${tier.name}${tier.active ? html` <span class="tag">active</span>` : null}</td>
          <th scope="row" data-label="Address">${backend.address}</th>
          <td data-label="Health" class="health-${backend.health}">${backend.health}</td>
          <td data-label="For" class="number">${ago(backend.since, now)}</td>
          <td data-label="Last check">${backend.lastCheck ?? "–"}</td>
          <td data-label="Took" class="number">${milliseconds(backend.checkMillis)}</td>
          <td data-label="Details" class="why">
            ${backend.localErrors ? html`<span class="problem Warning">${backend.localErrors.count} checks without a result: ${backend.localErrors.detail}</span> ` : null}
            ${backend.detail}
          </td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

function Limits({ limits }) {
  const tier = (name, status) =>
    Object.entries(status.limits).map(([limit, value]) => ({ name: `${name} ${limit}`, value, over: status.limited[limit] ?? 0 }));
  const rows = [...tier("primary", limits.primary), ...tier("backup", limits.backup)];
  return html`<h3>Limits</h3>
    ${limits.limited ? html`<p class="problem Warning">${limits.limited.limit} refuses connections since ${clock(limits.limited.since)}: ${count(limits.limited.perMinute)} a minute.</p>` : null}
    <table class="plain">
      <${Head} columns=${["Limit", "Value", "Connections over it"]} />
      <tbody>
        ${rows.map((row) => html`<tr key=${row.name}><th scope="row" data-label="Limit">${row.name}</th><td data-label="Value" class="number">${count(row.value)}</td><td data-label="Over it" class="number">${count(row.over)}</td></tr>`)}
      </tbody>
    </table>`;
}

function slowest(service, role) {
  const times = service.tiers.filter((tier) => tier.role === role).flatMap((tier) => tier.backends.map((backend) => backend.checkMillis));
  const known = times.filter((time) => typeof time === "number");
  return known.length ? Math.max(...known) : null;
}

// The check times seen since the view was opened.
function useTimes(service, path) {
  const [times, setTimes] = useState({ path, rows: [] });
  useEffect(() => {
    if (service) {
      const row = [Date.now() / 1000, slowest(service, "primary"), slowest(service, "backup")];
      setTimes((old) => ({ path, rows: [...(old.path === path ? old.rows : []), row].slice(-MOST_TIMES) }));
    }
  }, [service, path]);
  return times.path === path ? times.rows : [];
}

function Charts({ store, name, times }) {
  const rates = store.rates(name) ?? [];
  const seconds = store.bucketTimes();
  const line = (kind) => rates.map((kinds) => kinds?.[kind] ?? null);
  const last = rates.at(-1);
  const connections = last
    ? `New connections a second: ${rate(last[0])} to the primary, ${rate(last[1])} to the backup, ${rate(last[2])} refused.`
    : "No numbers of connections yet.";
  const time = times.at(-1);
  const words = (value) => (typeof value === "number" ? milliseconds(value) : "unknown");
  return html`<div class="charts">
    ${rates.length
      ? html`<${Chart}
          title="New connections by decision"
          unit=" /s"
          data=${[seconds, line(0), line(1), line(2)]}
          sentence=${connections}
          series=${[
            { label: "primary", color: "--primary" },
            { label: "backup", color: "--backup", dash: [8, 4] },
            { label: "refused", color: "--refused", dash: [2, 3] },
          ]}
        />`
      : null}
    ${times.length
      ? html`<${Chart}
          title="Time of the slowest check"
          unit=" ms"
          data=${[0, 1, 2].map((column) => times.map((row) => row[column]))}
          sentence="Slowest check: ${words(time[1])} on the primary, ${words(time[2])} on the backup."
          series=${[
            { label: "primary", color: "--primary" },
            { label: "backup", color: "--backup", dash: [8, 4] },
          ]}
        />`
      : null}
  </div>`;
}

// The states over time, from the events that the page has.
function Timeline({ events, breaker, now }) {
  const changes = events.filter((event) => event.to);
  if (changes.length === 0) {
    return null;
  }
  const begin = Date.parse(changes[0].at);
  const length = Math.max(1, now - begin);
  const parts = changes.map((event, index) => {
    const from = Date.parse(event.at);
    const to = index + 1 < changes.length ? Date.parse(changes[index + 1].at) : now;
    return { state: event.to, width: ((to - from) / length) * 100, from };
  });
  const words = `${changes.length} changes since ${clock(begin)}; now ${breaker.state}`;
  return html`<div class="timeline" role="img" aria-label=${words}>
      ${parts.map((part) => html`<i key=${part.from} class=${part.state} style=${{ width: `${part.width}%` }} title="${part.state} from ${clock(part.from)}"></i>`)}
    </div>
    <p class="soft">From ${clock(begin)} to now.</p>`;
}

function NodeTable({ nodes, chosen, choose, now }) {
  return html`<h2>On nodes</h2>
    <table class="plain">
      <${Head} columns=${["Node", "State", "Since", "Share of the primary", "Primary Up", "Backup Up", "Why"]} />
      <tbody>
        ${nodes.map(
          (node) => html`<tr key=${node.node}>
            <th scope="row" data-label="Node">
              <button type="button" aria-pressed=${node.node === chosen} onClick=${() => choose(node.node)}>${node.node}</button>
            </th>
            <td data-label="State"><${State} state=${node.state} /></td>
            <td data-label="Since" class="number">${ago(node.since, now)}</td>
            <td data-label="Share">${percent(node.share)}</td>
            <td data-label="Primary" class="number"><${Ups} ups=${node.primary} what="primary" /></td>
            <td data-label="Backup" class="number"><${Ups} ups=${node.backup} what="backup" /></td>
            <td data-label="Why" class="why"><span class="reason">${node.reason}</span> ${node.message}<${Problems} problems=${node.problems} /></td>
          </tr>`,
        )}
      </tbody>
    </table>`;
}

function Conditions({ conditions }) {
  return html`<h2>Conditions</h2>
    <table class="plain">
      <${Head} columns=${["Condition", "Status", "Reason", "Message"]} />
      <tbody>
        ${conditions.map(
          (condition) => html`<tr key=${condition.name}>
            <th scope="row" data-label="Condition">${condition.name}</th>
            <td data-label="Status" class=${condition.severity ?? ""}>${condition.status}</td>
            <td data-label="Reason">${condition.reason}</td>
            <td data-label="Message" class="why">${condition.message}</td>
          </tr>`,
        )}
      </tbody>
    </table>`;
}

export function Detail({ store, name }) {
  const [chosen, choose] = useState("");
  const [part, choosePart] = useState("");
  const title = useRef(null);
  useEffect(() => title.current?.focus(), []);
  const { value: detail, error } = usePolled(`v1/breakers/${encodeURIComponent(name)}`);
  const nodes = detail?.nodes ?? [];
  const node = nodes.find((row) => row.node === chosen) ?? nodes.find((row) => row.state !== "Closed") ?? nodes[0];
  const shown = node?.services.includes(part) ? part : node?.services[0];
  const path = shown && `v1/nodes/${encodeURIComponent(node.node)}/services/${encodeURIComponent(shown)}`;
  const { value: service, error: unreadable } = usePolled(path);
  const times = useTimes(service, path);
  const breaker = store.breakers.get(name) ?? detail?.breaker;
  const now = store.now();
  if (!breaker) {
    return html`<section><h1>${name}</h1><p class="empty">${store.scope ? (error ?? "There is no such breaker.") : "Loading"}</p></section>`;
  }
  const counts = store.counts.get(name);
  const events = store.events.filter((event) => event.breaker === name);
  const open = nodes.filter((row) => row.state === "Open").length;
  return html`<section aria-labelledby="breaker">
    <p class="back"><a href="#/">All breakers</a></p>
    <h1 id="breaker" tabindex="-1" ref=${title}>${name} <${State} state=${breaker.state} />${breaker.dryRun ? html` <span class="tag">dry run</span>` : null}</h1>
    <dl class="facts">
      <div><dt>What happened</dt><dd><span class="reason">${breaker.reason}</span> ${breaker.message}</dd></div>
      <div><dt>Since</dt><dd>${breaker.since ? html`<time datetime=${breaker.since}>${clock(breaker.since)}</time>, ${ago(breaker.since, now)} ago` : "not known"}</dd></div>
      <div><dt>What breaker does</dt><dd>${doing(breaker)}</dd></div>
      <div>
        <dt>Who is affected</dt>
        <dd>
          ${nodes.length > 1 ? `Clients on ${open} of ${nodes.length} nodes. ` : ""}
          ${counts ? `${count(counts[3])} flows on the backup; ${count(counts[1])} connections moved and ${count(counts[2])} refused so far.` : "Numbers of connections are not known."}
        </dd>
      </div>
      <div><dt>Share of the primary</dt><dd><${Share} share=${breaker.share} /> ${percent(breaker.share)}</dd></div>
      <div><dt>Pods Up</dt><dd>primary <${Ups} ups=${breaker.primary} what="primary" />, backup <${Ups} ups=${breaker.backup} what="backup" /></dd></div>
      ${breaker.override ? html`<div><dt>Override</dt><dd>${overrideWords(breaker.override, now)}${breaker.override.reason ? `: ${breaker.override.reason}` : ""}</dd></div>` : null}
      ${detail?.facts.map(([fact, value]) => html`<div key=${fact}><dt>${fact}</dt><dd>${value}</dd></div>`)}
    </dl>
    <${Problems} problems=${breaker.problems} />
    ${error ? html`<p class="problem Error">${error}</p>` : null}
    ${detail ? html`<${Commands} commands=${detail.commands} />` : null}
    <${Charts} store=${store} name=${name} times=${times} />
    ${store.scope?.kind === "Cluster" && nodes.length ? html`<${NodeTable} nodes=${nodes} chosen=${node?.node} choose=${choose} now=${now} />` : null}
    <h2>Pods and checks${node && store.scope?.kind === "Cluster" ? ` as ${node.node} sees them` : ""}</h2>
    ${node?.services.length > 1
      ? html`<p>${node.services.map((service) => html`<button type="button" key=${service} aria-pressed=${service === shown} onClick=${() => choosePart(service)}>${service}</button> `)}</p>`
      : null}
    ${unreadable ? html`<p class="problem Warning">${unreadable}</p>` : null}
    ${service ? html`<${Backends} service=${service} now=${now} />` : unreadable ? null : html`<p class="soft">${path ? "Loading" : "No node knows this breaker."}</p>`}
    ${service?.limits ? html`<${Limits} limits=${service.limits} />` : null}
    ${detail?.conditions.length ? html`<${Conditions} conditions=${detail.conditions} />` : null}
    <h2>Timeline</h2>
    <${Timeline} events=${events} breaker=${breaker} now=${now} />
    ${events.length ? html`<${EventList} events=${events.slice(-MOST_EVENTS).reverse()} breaker=${name} />` : html`<p class="empty">No events yet.</p>`}
  </section>`;
}
