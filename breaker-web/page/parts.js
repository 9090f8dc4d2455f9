// Parts of several views.

import { html, useState } from "./preact.js";
import { STATES, count, percent } from "./words.js";

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

// The heads of a table's columns. `optional`: those that a narrow screen leaves out.
export function Head({ columns, optional = [] }) {
  return html`<thead>
    <tr>${columns.map((head) => html`<th scope="col" key=${head} class=${optional.includes(head) ? "optional" : ""}>${head}</th>`)}</tr>
  </thead>`;
}

// The first rows of a long table, and a button for the others.
export function useFirst(rows, most) {
  const [all, setAll] = useState(false);
  const shown = all ? rows : rows.slice(0, most);
  const hidden = rows.length - shown.length;
  const more = hidden ? html`<p><button type="button" onClick=${() => setAll(true)}>Show ${count(hidden)} more</button></p>` : null;
  return [shown, more];
}

export function Filter({ filter, setFilter, placeholder, children }) {
  return html`<p class="filter">
    <label for="filter">Filter</label>
    <input id="filter" type="search" placeholder=${placeholder} value=${filter} onInput=${(event) => setFilter(event.target.value)} />
    ${children}
  </p>`;
}
