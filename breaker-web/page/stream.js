// The connection to the server: the stream of messages, and requests for details.

const RETRY_MS = 1000;
// The server sends something every 15 seconds. A connection without it is dead, although nobody has closed it.
const SILENCE_MS = 20000;
const TOKEN = "breaker-token";

// `kubectl breaker dashboard` hands its token over in the fragment, which browsers do not send. It stays in this tab.
export function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    sessionStorage.setItem(TOKEN, token);
    history.replaceState(null, "", location.pathname + location.search + "#/");
  }
}

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { authorization: `Bearer ${token}` } : {};
}

// Requests a path that is relative to the page, so that the page works below any prefix.
async function request(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (!response.ok) {
    const text = (await response.text()).trim();
    let why = text;
    try {
      why = JSON.parse(text).error ?? text;
    } catch {
      // The text is the reason.
    }
    throw new Error(why || `the server answered ${response.status}`);
  }
  return response;
}

export async function get(path, signal) {
  return (await request(path, { signal })).json();
}

// Follows the stream for as long as the page is open. `onMessage` gets each message; `onLost` gets the reason when the
// connection is lost.
export async function follow(onMessage, onLost) {
  let lastId = "";
  for (;;) {
    try {
      const response = await request("v1/stream", {
        headers: lastId ? { "last-event-id": lastId } : {},
        cache: "no-store",
      });
      for await (const { id, data } of events(response.body)) {
        lastId = id || lastId;
        onMessage(JSON.parse(data));
      }
      onLost("the server ended the connection");
    } catch (error) {
      onLost(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

// Splits a body into server-sent events. The browser's EventSource cannot send a token.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  const silence = () => reader.cancel(new Error("nothing was heard for a while"));
  let timer;
  try {
    for (;;) {
      timer = setTimeout(silence, SILENCE_MS);
      const { value, done } = await reader.read();
      clearTimeout(timer);
      if (done) {
        return;
      }
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = { id: "", data: "" };
        for (const line of block.split("\n")) {
          const colon = line.indexOf(":");
          const name = line.slice(0, colon);
          if (name in event) {
            event[name] += line.slice(colon + 1).trimStart();
          }
        }
        if (event.data) {
          yield event;
        }
      }
    }
  } finally {
    clearTimeout(timer);
    reader.cancel().catch(() => {});
  }
}
