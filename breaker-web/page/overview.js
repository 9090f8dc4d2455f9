// The first view: what needs attention at one look, and a row for each breaker.

import { Component, html, useState } from "./preact.js";
import { Sparkline } from "./charts.js";
import { GROUPS, keyOf } from "./store.js";
import { STATES, ago, count, overrideWords, percent, rate } from "./words.js";

const FIRST_ROWS = 100;

export function State({ state }) {
  const { letter, word, kind } = STATES[state] ?? STATES.Unknown;
  return html`<span class="state ${kind}"><b aria-hidden="true">${letter}</b>${word}</span>`;
}

export function Share({ share }) {
  const label = `primary ${percent(share)}, backup ${percent(1000 - share)}`;
  return html`<span class="share" role="img" aria-label=${label} title=${label}><i style=${{ width: `${share / 10}%` }}></i></span>`;
}

export function Problems({ problems = [] }) {
  return problems.length
    ? html`<ul class="problems">
        ${problems.map((problem) => html`<li class=${problem.severity} key=${problem.text}>${problem.text}</li>`)}
      </ul>`
    : null;
}

export function Ups({ ups, what }) {
  const missing = ups.up < ups.total || ups.total === 0;
  return html`<span class=${missing ? "missing" : ""}><span aria-hidden="true">${ups.up}/${ups.total}</span><span class="hidden">${ups.up} of ${ups.total} pods of the ${what} are Up</span></span>`;
}

// How many breakers are in which state, and what is wrong with the nodes.
export function Strip({ store, setFilter }) {
  const rows = [...store.breakers.values()];
  const number = (group) => rows.filter(GROUPS[group]).length;
  const silent = store.nodes.filter((node) => node.silent).length;
  const troubled = store.nodes.filter((node) => node.problems?.length).length;
  const versions = [...new Set(store.nodes.map((node) => node.version).filter(Boolean))];
  const tile = (group, label, kind) => {
    const value = number(group);
    return html`<li class=${value ? kind : "calm"}>
      <button type="button" onClick=${() => setFilter(`is:${group}`)}><b>${count(value)}</b> ${label}</button>
    </li>`;
  };
  const nodes = (value, label, kind) => html`<li class=${value ? kind : "calm"}><a href="#/nodes"><b>${count(value)}</b> ${value === 1 ? "node" : "nodes"} ${label}</a></li>`;
  return html`<h2 class="hidden">Summary</h2>
    <ul class="strip">
    ${tile("open", "open", "bad")}
    ${tile("failure", "not carried out", "bad")}
    ${tile("returning", "returning", "warn")}
    ${tile("forced", "forced", "warn")}
    ${tile("closed", "closed", "good")}
    ${store.nodes.length ? nodes(store.nodes.length - silent, "heard", "good") : null}
    ${silent ? nodes(silent, "silent", "bad") : null}
    ${troubled ? nodes(troubled, "with problems", "warn") : null}
    ${versions.length ? html`<li class="calm version">agents ${versions.join(", ")}</li>` : null}
  </ul>`;
}

class Row extends Component {
  shouldComponentUpdate(next) {
    return next.row !== this.props.row || next.tick !== this.props.tick || next.counts !== this.props.counts;
  }

  render({ row, store, counts }) {
    const key = keyOf(row);
    const now = store.now();
    const perSecond = store.rateNow(key);
    const worst = row.problems?.[0];
    const cell = (label, content, kind = "") => html`<td data-label=${label} class=${kind}>${content}</td>`;
    return html`<tr class="attention-${row.attention}">
      <th scope="row" data-label="Breaker">
        <a class="name" href="#/breaker/${encodeURIComponent(key)}">${row.namespace ? html`<span class="ns">${row.namespace}/</span><wbr />` : null}${row.name}</a>
      </th>
      ${cell("State", html`<${State} state=${row.state} />${row.dryRun ? html` <span class="tag">dry run</span>` : null}`)}
      ${cell("Since", html`<time datetime=${row.since} title=${row.since}>${ago(row.since, now)}</time>`, "since")}
      ${cell(
        "Why",
        html`${row.override ? html`<span class="tag">${overrideWords(row.override, now)}</span> ${row.override.reason ?? ""} ` : null}
          <span class="reason">${row.reason}</span> ${row.message}
          ${worst ? html`<span class="problem ${worst.severity}">${worst.text}</span>` : null}`,
        "why",
      )}
      ${cell("Share", html`<${Share} share=${row.share} />`, "optional")}
      ${cell("New/s", html`<${Sparkline} rates=${store.rates(key)} label="new connections in the last five minutes" /> ${rate(perSecond)}`, "number rate")}
      ${cell("Moved", counts ? count(counts[1]) : "–", "number optional")}
      ${cell("Refused", counts ? count(counts[2]) : "–", "number optional")}
      ${cell("Flows", counts ? count(counts[3]) : "–", "number optional")}
      ${cell("Primary", html`<${Ups} ups=${row.primary} what="primary" />`, "number")}
      ${cell("Backup", html`<${Ups} ups=${row.backup} what="backup" />`, "number")}
    </tr>`;
  }
}

const HEAD = ["Breaker", "State", "Since", "Why", "Share of the primary", "New connections/s", "Moved", "Refused", "Flows on the backup", "Primary Up", "Backup Up"];
const OPTIONAL = ["Share of the primary", "Moved", "Refused", "Flows on the backup"];

export function Overview({ store, filter, setFilter }) {
  const [all, setAll] = useState(false);
  const rows = store.sorted(filter);
  const shown = all ? rows : rows.slice(0, FIRST_ROWS);
  // Rates and ages change every five seconds.
  const tick = Math.floor(store.now() / 5000);
  return html`<section aria-labelledby="breakers">
    <h1 id="breakers" class="hidden">Breakers</h1>
    <${Strip} store=${store} setFilter=${setFilter} />
    <p class="filter">
      <label for="filter">Filter</label>
      <input id="filter" type="search" placeholder="name, state or reason" value=${filter} onInput=${(event) => setFilter(event.target.value)} />
      <span role="status">${rows.length === store.breakers.size ? `${count(rows.length)} breakers` : `${count(rows.length)} of ${count(store.breakers.size)} breakers`}</span>
    </p>
    ${rows.length === 0
      ? html`<p class="empty">${store.breakers.size ? "No breaker matches the filter." : store.notes.length ? "No breakers are shown." : "No Service is protected."}</p>`
      : html`<table class="breakers">
          <thead>
            <tr>${HEAD.map((head) => html`<th scope="col" key=${head} class=${OPTIONAL.includes(head) ? "optional" : ""}>${head}</th>`)}</tr>
          </thead>
          <tbody>
            ${shown.map((row) => html`<${Row} key=${keyOf(row)} row=${row} counts=${store.counts.get(keyOf(row))} store=${store} tick=${tick} />`)}
          </tbody>
        </table>`}
    ${shown.length < rows.length
      ? html`<p><button type="button" onClick=${() => setAll(true)}>Show ${count(rows.length - shown.length)} more</button></p>`
      : null}
  </section>`;
}
