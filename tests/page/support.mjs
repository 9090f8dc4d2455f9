// Starts the page's server with made-up data, and a browser.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import puppeteer from "puppeteer-core";

const SERVER = process.env.BREAKER_PAGE;
const BROWSER = process.env.BREAKER_BROWSER;
const PATIENCE_MS = 30000;

// The server. `options`: breakers, nodes, port.
export class Server {
  static async start(options = {}) {
    const args = Object.entries(options).flatMap(([name, value]) => [`--${name}`, String(value)]);
    const server = new Server();
    server.process = spawn(SERVER, args, { stdio: ["ignore", "pipe", "inherit"] });
    const [url] = await once(createInterface(server.process.stdout), "line");
    server.url = url;
    return server;
  }

  get port() {
    return new URL(this.url).port;
  }

  async tell(path) {
    const response = await fetch(new URL(`test/${path}`, this.url), { method: "POST" });
    return response.text();
  }

  async stop() {
    const ended = once(this.process, "exit");
    this.process.kill("SIGKILL");
    await ended;
  }
}

export async function launch() {
  // Chromium's own sandbox does not work for root.
  const args = ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb", "--font-render-hinting=none"];
  return puppeteer.launch({ executablePath: BROWSER, args });
}

// A page that shows `hash`, with everything that the browser complained about.
export async function open(browser, url, hash = "#/", width = 1440, height = 900) {
  const page = await browser.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  page.complaints = [];
  page.requests = [];
  page.on("pageerror", (error) => page.complaints.push(error.message));
  page.on("console", (message) => {
    if (["error", "warn"].includes(message.type())) {
      page.complaints.push(message.text());
    }
  });
  page.on("request", (request) => page.requests.push(request.url()));
  await page.setViewport({ width, height });
  await page.goto(url + hash);
  await page.waitForFunction(() => document.querySelector(".age.live"));
  return page;
}

// Goes to another view and waits until it is there.
export async function show(page, hash) {
  await page.evaluate((to) => (location.hash = to), hash);
  await page.waitForSelector(VIEWS[hash.split("/")[1]?.split("?")[0] ?? ""]);
}

// What each view shows when it is complete.
const VIEWS = { "": "table.breakers", breaker: "table.backends", nodes: "table.nodes", events: "table.events" };

export const HASHES = ["#/", "#/breaker/shop%2Fcheckout", "#/nodes", "#/events"];

export async function waitText(page, selector, text) {
  await page.waitForFunction(
    (where, what) => [...document.querySelectorAll(where)].some((node) => node.textContent.includes(what)),
    {},
    selector,
    text,
  );
}

// Bytes that a page's scripts use, after a garbage collection.
export async function heap(page) {
  const session = await page.createCDPSession();
  await session.send("HeapProfiler.collectGarbage");
  const { usedSize } = await session.send("Runtime.getHeapUsage");
  await session.detach();
  return usedSize;
}
