// What the page knows: the rows of the stream, and a history of rates that the page keeps itself.

import { isMoving, words } from "./words.js";

// Rates are counted in buckets of this length.
export const BUCKET_MS = 5000;
const BUCKETS = 60;
const GAP_MS = 15000;
const MOST_EVENTS = 1000;
const MOST_ANNOUNCED = 3;
const ATTENTION = ["Failure", "Open", "Returning", "Forced", "Warning", "None"];

// New connections of one breaker in the last five minutes, in buckets of five seconds.
class History {
  constructor() {
    this.numbers = new Float64Array(BUCKETS).fill(-1);
    this.values = new Float64Array(BUCKETS * 3);
  }

  // Spreads the connections between two times over the buckets.
  add(from, to, deltas) {
    const length = Math.max(1, to - from);
    for (let number = Math.floor(from / BUCKET_MS); number * BUCKET_MS < to; number++) {
      const begin = Math.max(from, number * BUCKET_MS);
      const part = (Math.min(to, (number + 1) * BUCKET_MS) - begin) / length;
      const place = number % BUCKETS;
      if (this.numbers[place] !== number) {
        this.numbers[place] = number;
        this.values.fill(0, place * 3, place * 3 + 3);
      }
      deltas.forEach((delta, kind) => (this.values[place * 3 + kind] += delta * part));
    }
  }

  // Rates per second by kind (primary, backup, rejected) in the buckets before `at`, oldest first. A bucket that is not
  // within one of the spans [from, to] is `undefined`: the page was not connected.
  rates(at, spans) {
    const last = Math.floor(at / BUCKET_MS) - 1;
    return Array.from({ length: BUCKETS }, (_, index) => {
      const number = last - (BUCKETS - 1 - index);
      const [begin, end] = [number * BUCKET_MS, (number + 1) * BUCKET_MS];
      if (!spans.some(([from, to]) => from <= begin && to >= end)) {
        return undefined;
      }
      const place = number % BUCKETS;
      const known = this.numbers[place] === number;
      return [0, 1, 2].map((kind) => (known ? (this.values[place * 3 + kind] * 1000) / BUCKET_MS : 0));
    });
  }
}

export class Store {
  constructor() {
    this.scope = undefined;
    this.breakers = new Map();
    this.counts = new Map();
    this.histories = new Map();
    this.nodes = [];
    this.events = [];
    this.notes = [];
    this.lost = undefined;
    this.at = 0;
    this.spans = [];
    this.receivedAt = 0;
    this.listeners = new Set();
    this.announcement = "";
  }

  subscribe(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  // The server's time now, as far as the last message tells it.
  now() {
    return this.at ? this.at + performance.now() - this.receivedAt : Date.now();
  }

  // Milliseconds since the data was current.
  age() {
    return this.at ? performance.now() - this.receivedAt : 0;
  }

  apply(message) {
    const at = Date.parse(message.at);
    const isGap = at - this.at > GAP_MS || at < this.at;
    if (message.scope) {
      this.scope = message.scope;
      const keys = new Set(message.breakers?.map(keyOf));
      [...this.breakers.keys()].filter((key) => !keys.has(key)).forEach((key) => this.forget(key));
    }
    message.removed?.forEach((key) => this.forget(key));
    const changes = (message.breakers ?? []).map((row) => this.put(row, message.scope)).filter(Boolean);
    if (changes.length) {
      this.announcement = changes.slice(0, MOST_ANNOUNCED).join("; ") + (changes.length > MOST_ANNOUNCED ? "; and more" : "");
    }
    for (const [key, counts] of Object.entries(message.counts ?? {})) {
      this.addCounts(key, counts, at, isGap);
    }
    this.nodes = message.nodes ?? this.nodes;
    this.notes = message.notes ?? this.notes;
    this.addEvents(message.events ?? []);
    if (isGap) {
      this.spans.push([at, at]);
    }
    this.spans.at(-1)[1] = at;
    this.spans = this.spans.filter(([, to]) => to > at - BUCKETS * BUCKET_MS && to <= at);
    this.at = at;
    // The data of the first message may be old.
    this.receivedAt = performance.now() - (message.now ? Math.max(0, Date.parse(message.now) - at) : 0);
    this.lost = undefined;
    this.tell();
  }

  lose(why) {
    this.lost = why;
    this.tell();
  }

  tell() {
    this.listeners.forEach((listener) => listener());
  }

  // Returns what to announce.
  put(row, isFirst) {
    const key = keyOf(row);
    const before = this.breakers.get(key);
    this.breakers.set(key, row);
    return before && before.state !== row.state && !isFirst ? `${key} is ${row.state} now: ${row.message || row.reason}` : "";
  }

  forget(key) {
    this.breakers.delete(key);
    this.counts.delete(key);
    this.histories.delete(key);
  }

  addCounts(key, counts, at, isGap) {
    const before = this.counts.get(key);
    this.counts.set(key, counts);
    if (!this.histories.has(key)) {
      this.histories.set(key, new History());
    }
    const deltas = before && [0, 1, 2].map((kind) => counts[kind] - before[kind]);
    // Counters of a breaker that was removed and added again begin anew.
    if (deltas && !isGap && deltas.every((delta) => delta >= 0)) {
      this.histories.get(key).add(this.at, at, deltas);
    }
  }

  addEvents(events) {
    const last = this.events.at(-1);
    const isNew = (event) => !last || event.id > last.id || Date.parse(event.at) > Date.parse(last.at);
    const fresh = events.filter(isNew);
    if (fresh.length) {
      this.events = [...this.events, ...fresh].slice(-MOST_EVENTS);
    }
  }

  // Breakers that match a filter: what needs attention comes first. A word like `is:open` means a group of the summary.
  sorted(filter) {
    const wanted = words(filter);
    const matches = (row, word) => {
      const group = word.startsWith("is:") && GROUPS[word.slice(3)];
      const text = `${keyOf(row)} ${row.state} ${row.reason} ${row.message} ${row.override?.mode ?? ""}`.toLowerCase();
      return group ? group(row) : text.includes(word);
    };
    const rows = [...this.breakers.values()].filter((row) => wanted.every((word) => matches(row, word)));
    const rank = (row) => ATTENTION.indexOf(row.attention);
    return rows.sort((a, b) => rank(a) - rank(b) || keyOf(a).localeCompare(keyOf(b)));
  }

  rates(key) {
    return this.histories.get(key)?.rates(this.at, this.spans);
  }

  // When the buckets of `rates` begin, in seconds since 1970.
  bucketTimes() {
    const end = Math.floor(this.at / BUCKET_MS);
    return Array.from({ length: BUCKETS }, (_, index) => ((end - BUCKETS + index) * BUCKET_MS) / 1000);
  }
}

// The rate of all kinds together; `undefined` if it is not known.
export function total(rates) {
  return rates && rates[0] + rates[1] + rates[2];
}

// The groups of the summary.
export const GROUPS = {
  open: isMoving,
  failure: (row) => row.attention === "Failure",
  returning: (row) => row.attention === "Returning",
  forced: (row) => row.override !== undefined,
  closed: (row) => row.state === "Closed",
};

export function keyOf(row) {
  return row.namespace ? `${row.namespace}/${row.name}` : row.name;
}
