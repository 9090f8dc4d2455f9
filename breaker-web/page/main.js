// The page: header, the view that the fragment of the URL names, and keys.

import { html, render, useEffect, useReducer, useRef, useState } from "./preact.js";
import { Detail } from "./detail.js";
import { Events } from "./events.js";
import { Nodes } from "./nodes.js";
import { Overview } from "./overview.js";
import { Store } from "./store.js";
import { follow, takeToken } from "./stream.js";
import { isMoving, span } from "./words.js";

const KEYS_OFF = "breaker-keys-off";

// The page greys out when it has heard nothing for this long.
const STALE_MS = 3000;

const KEYS = [
  ["/", "filter"],
  ["j, k", "next, previous breaker"],
  ["Enter", "open"],
  ["Esc", "back"],
  ["g b", "breakers"],
  ["g n", "nodes"],
  ["g e", "events"],
  ["?", "this help"],
];

const store = new Store();

function route() {
  const [, view = "", name = ""] = location.hash.slice(1).split("/");
  try {
    return { view, name: decodeURIComponent(name) };
  } catch {
    return { view: "", name: "" };
  }
}

function setTitle() {
  const open = [...store.breakers.values()].filter(isMoving).length;
  document.title = `${open ? `(${open} open) ` : ""}${route().name || store.scope?.name || ""} – breaker`;
}

// Renders again when the store, the URL or the second changes, at most once a frame.
function useChanges() {
  const [, again] = useReducer((number) => number + 1, 0);
  useEffect(() => {
    let frame = 0;
    const changed = () => {
      takeToken();
      // Browsers render nothing in a tab that is not seen, but show its title.
      setTitle();
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        again();
      });
    };
    const end = store.subscribe(changed);
    const timer = setInterval(changed, 1000);
    addEventListener("hashchange", changed);
    return () => {
      end();
      clearInterval(timer);
      removeEventListener("hashchange", changed);
      cancelAnimationFrame(frame);
    };
  }, []);
}

function moveFocus(step) {
  const links = [...document.querySelectorAll("a.name")];
  const at = links.indexOf(document.activeElement);
  links[Math.min(links.length - 1, Math.max(0, at < 0 ? 0 : at + step))]?.focus();
}

function useKeys(help) {
  useEffect(() => {
    let before = "";
    const pressed = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || help.current?.open || localStorage.getItem(KEYS_OFF)) {
        return;
      }
      const isTyping = event.target instanceof HTMLInputElement && event.target.type !== "checkbox";
      const key = `${before}${event.key}`;
      before = event.key === "g" && !isTyping ? "g " : "";
      if (event.key === "Escape") {
        if (isTyping) {
          event.target.blur();
        } else if (route().view) {
          location.hash = "#/";
        }
        return;
      }
      const actions = {
        "/": () => document.getElementById("filter")?.focus(),
        j: () => moveFocus(1),
        k: () => moveFocus(-1),
        "?": () => help.current?.showModal(),
        "g b": () => (location.hash = "#/"),
        "g n": () => (location.hash = "#/nodes"),
        "g e": () => (location.hash = "#/events"),
      };
      if (!isTyping && actions[key]) {
        event.preventDefault();
        actions[key]();
      }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

function Age() {
  const isStale = store.lost !== undefined || store.age() > STALE_MS;
  document.body.classList.toggle("stale", isStale && store.at > 0);
  const words = !store.at ? "connecting" : isStale ? `${span(store.age())} old; trying again` : "live";
  // Screen readers hear of the change, not of every second.
  const change = isStale ? "not connected" : store.at ? "live" : "";
  return html`<span class="age ${isStale ? "old" : "live"}" title="age of what this page shows">${words}${store.lost ? `: ${store.lost}` : ""}</span>
    <span class="hidden" role="status">${change}</span>`;
}

function Tab({ view, current, children }) {
  return html`<a href="#/${view}" aria-current=${view === current ? "page" : undefined}>${children}</a>`;
}

function Page() {
  const help = useRef(null);
  const [filter, setFilter] = useState("");
  useChanges();
  useKeys(help);
  const { view, name } = route();
  const title = store.scope ? store.scope.name : "breaker";
  const views = {
    breaker: () => html`<${Detail} store=${store} name=${name} key=${name} />`,
    nodes: () => html`<${Nodes} store=${store} />`,
    events: () => html`<${Events} store=${store} filter=${filter} setFilter=${setFilter} />`,
  };
  return html`<a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("main").focus();
    }}>Skip to the content</a>
    <header>
      <span class="title"><img src="icon.svg" alt="" width="20" height="20" /> breaker${" "}
        <span class="soft">${store.scope ? `${store.scope.kind === "Node" ? "node" : "cluster"} ${title}${store.scope.namespace ? `, namespace ${store.scope.namespace}` : ""}` : ""}</span>
      </span>
      <nav aria-label="Views">
        <${Tab} view="" current=${view}>Breakers<//>
        <${Tab} view="nodes" current=${view}>Nodes<//>
        <${Tab} view="events" current=${view}>Events<//>
      </nav>
      <${Age} />
      <button type="button" class="help" aria-label="Keys" onClick=${() => help.current.showModal()}>?</button>
    </header>
    <main id="main" tabindex="-1">
      ${store.notes.length ? html`<ul class="problems notes">${store.notes.map((note) => html`<li class="Warning" key=${note}>${note}</li>`)}</ul>` : null}
      ${(views[view] ?? (() => html`<${Overview} store=${store} filter=${filter} setFilter=${setFilter} />`))()}
    </main>
    <div class="hidden" aria-live="polite">${store.announcement}</div>
    <dialog ref=${help} aria-labelledby="keys">
      <h2 id="keys">Keys</h2>
      <dl>${KEYS.map(([key, what]) => html`<div key=${key}><dt><kbd>${key}</kbd></dt><dd>${what}</dd></div>`)}</dl>
      <p>
        <input type="checkbox" id="keys-on" checked=${!localStorage.getItem(KEYS_OFF)} onChange=${(event) => (event.target.checked ? localStorage.removeItem(KEYS_OFF) : localStorage.setItem(KEYS_OFF, "1"))} />
        <label for="keys-on">Use these keys</label>
      </p>
      <form method="dialog"><button type="submit">Close</button></form>
    </dialog>`;
}

takeToken();
render(html`<${Page} />`, document.getElementById("page"));
follow(
  (message) => store.apply(message),
  (why) => store.lose(why),
);
