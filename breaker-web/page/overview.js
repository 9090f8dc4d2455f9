// The first view: what needs attention at one look, and a row for each breaker.

import { Component, html } from "./preact.js";
import { Sparkline } from "./charts.js";
import { Filter, Head, Share, State, Ups, useFirst } from "./parts.js";
import { BUCKET_MS, GROUPS, keyOf, total } from "./store.js";
import { ago, count, overrideWords, rate } from "./words.js";

const FIRST_ROWS = 100;

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
    const rates = store.rates(key);
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
      ${cell("New/s", html`<${Sparkline} rates=${rates} label="new connections in the last five minutes" /> ${rate(total(rates?.at(-1)))}`, "number rate")}
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
  const rows = store.sorted(filter);
  const [shown, more] = useFirst(rows, FIRST_ROWS);
  // Rates and ages change with each bucket.
  const tick = Math.floor(store.now() / BUCKET_MS);
  return html`<section aria-labelledby="breakers">
    <h1 id="breakers" class="hidden">Breakers</h1>
    <${Strip} store=${store} setFilter=${setFilter} />
    <${Filter} filter=${filter} setFilter=${setFilter} placeholder="name, state or reason">
      <span role="status">${rows.length === store.breakers.size ? `${count(rows.length)} breakers` : `${count(rows.length)} of ${count(store.breakers.size)} breakers`}</span>
    <//>
    ${rows.length === 0
      ? html`<p class="empty">${store.breakers.size ? "No breaker matches the filter." : store.notes.length ? "No breakers are shown." : "No Service is protected."}</p>`
      : html`<table class="breakers">
          <${Head} columns=${HEAD} optional=${OPTIONAL} />
          <tbody>
            ${shown.map((row) => html`<${Row} key=${keyOf(row)} row=${row} counts=${store.counts.get(keyOf(row))} store=${store} tick=${tick} />`)}
          </tbody>
        </table>`}
    ${more}
  </section>`;
}
