// Numbers, times and states in words.

export const STATES = {
  Closed: { letter: "C", word: "Closed", kind: "closed" },
  Open: { letter: "O", word: "Open", kind: "open" },
  HalfOpen: { letter: "H", word: "Half-open", kind: "half" },
  NotProtected: { letter: "N", word: "Not protected", kind: "open" },
  Unknown: { letter: "?", word: "Unknown", kind: "unknown" },
  "": { letter: "?", word: "Not programmed", kind: "unknown" },
};

// The states of the matrix, by letter.
export const LETTERS = {
  C: STATES.Closed,
  O: STATES.Open,
  H: STATES.HalfOpen,
  N: { letter: "N", word: "Not programmed", kind: "unknown" },
  "?": { letter: "?", word: "No report", kind: "unknown" },
  "-": { letter: "·", word: "Not on this node", kind: "absent" },
};

// The words of a filter.
export function words(filter) {
  return filter.toLowerCase().split(/\s+/).filter(Boolean);
}

export function span(milliseconds) {
  const seconds = Math.max(0, Math.floor(milliseconds / 1000));
  if (seconds < 120) {
    return `${seconds} s`;
  }
  if (seconds < 7200) {
    return `${Math.floor(seconds / 60)} min`;
  }
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

// How long ago a time of the server was. `now`: the server's time.
export function ago(time, now) {
  return time ? span(now - Date.parse(time)) : "";
}

export function clock(time) {
  const date = new Date(time);
  const today = new Date().toDateString() === date.toDateString();
  const options = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  return today ? date.toLocaleTimeString([], options) : date.toLocaleString([], { month: "short", day: "numeric", ...options });
}

export function count(number) {
  return number.toLocaleString("en");
}

export function rate(perSecond) {
  if (perSecond === undefined) {
    return "–";
  }
  return perSecond >= 10 || perSecond === 0 ? count(Math.round(perSecond)) : perSecond.toFixed(1);
}

export function milliseconds(value) {
  return typeof value === "number" ? `${value.toFixed(value < 10 ? 2 : 0)} ms` : "–";
}

export function percent(permille) {
  return `${permille % 10 ? (permille / 10).toFixed(1) : permille / 10} %`;
}

// Whether new connections go to a backup.
export function isMoving(breaker) {
  return breaker.state === "Open" && !breaker.dryRun;
}

// What happens to new connections now.
export function doing(breaker) {
  const { state, share, backup } = breaker;
  const to = `the backup (${backup.up} of ${backup.total} Up)`;
  if (breaker.dryRun && state !== "Closed") {
    return "Dry run: new connections go to the primary, as if the breaker were closed.";
  }
  if (backup.up === 0 && ["Open", "HalfOpen"].includes(state)) {
    const policy = breaker.whenAllUnhealthy;
    const what = { PassThrough: "go to the primary", Reject: "are refused" }[policy];
    return what ? `No backup is Up, so new connections ${what} (whenAllUnhealthy: ${policy}).` : "No backup is Up, so whenAllUnhealthy applies.";
  }
  switch (state) {
    case "Closed":
      return share < 1000
        ? `The primary gets ${percent(share)} of new connections, and ${to} gets the rest.`
        : "New connections go to the primary.";
    case "Open":
      return `New connections go to ${to}.`;
    case "HalfOpen":
      return `Trial connections reach the primary. All others go to ${to}.`;
    case "NotProtected":
      return "Nothing: the request is refused, and connections go where kube-proxy sends them.";
    default:
      return "Nothing is known yet.";
  }
}

export function overrideWords(override, now) {
  if (!override) {
    return "";
  }
  const end = override.until ? Date.parse(override.until) - now : undefined;
  const until = end === undefined ? "until reset" : end > 0 ? `for ${span(end)} more` : "ended";
  return `${override.mode} ${until}`;
}
