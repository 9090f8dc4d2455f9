// Events, newest first, as they come.

import { html } from "./preact.js";
import { State } from "./overview.js";
import { clock } from "./words.js";

const MOST_ROWS = 300;

export function EventList({ events, breaker }) {
  return html`<table class="events">
    <thead>
      <tr><th scope="col">Time</th>${breaker ? null : html`<th scope="col">Breaker</th>`}<th scope="col">Event</th><th scope="col">What happened</th></tr>
    </thead>
    <tbody>
      ${events.map(
        (event) => html`<tr key=${`${event.id} ${event.at}`} class=${event.isWarning ? "warning" : ""}>
          <td data-label="Time"><time datetime=${event.at}>${clock(event.at)}</time></td>
          ${breaker ? null : html`<td data-label="Breaker">${event.breaker ? html`<a href="#/breaker/${encodeURIComponent(event.breaker)}">${event.breaker}</a>` : null}</td>`}
          <td data-label="Event">${event.to ? html`<${State} state=${event.to} />` : event.kind}</td>
          <td data-label="Details" class="why">${event.message}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

export function Events({ store, filter, setFilter }) {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (event) => words.every((word) => `${event.breaker} ${event.kind} ${event.message}`.toLowerCase().includes(word));
  const events = store.events.filter(matches).slice(-MOST_ROWS).reverse();
  return html`<section aria-labelledby="events">
    <h1 id="events">Events</h1>
    <p class="filter">
      <label for="filter">Filter</label>
      <input id="filter" type="search" placeholder="breaker or words" value=${filter} onInput=${(input) => setFilter(input.target.value)} />
    </p>
    ${events.length ? html`<${EventList} events=${events} />` : html`<p class="empty">No events${filter ? " match the filter" : " yet"}.</p>`}
  </section>`;
}
