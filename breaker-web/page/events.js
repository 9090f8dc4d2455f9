// Events, newest first, as they come.

import { html } from "./preact.js";
import { Filter, Head, State } from "./parts.js";
import { clock, words } from "./words.js";

const MOST_ROWS = 300;

export function EventList({ events, breaker }) {
  return html`<table class="events">
    <${Head} columns=${["Time", ...(breaker ? [] : ["Breaker"]), "Event", "What happened"]} />
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
  const wanted = words(filter);
  const matches = (event) => wanted.every((word) => `${event.breaker} ${event.kind} ${event.message}`.toLowerCase().includes(word));
  const events = store.events.filter(matches).slice(-MOST_ROWS).reverse();
  return html`<section aria-labelledby="events">
    <h1 id="events">Events</h1>
    <${Filter} filter=${filter} setFilter=${setFilter} placeholder="breaker or words" />
    ${events.length ? html`<${EventList} events=${events} />` : html`<p class="empty">No events${filter ? " match the filter" : " yet"}.</p>`}
  </section>`;
}
