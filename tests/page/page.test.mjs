// The page in a real browser, with made-up data.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { HtmlValidate } from "html-validate";
import { HASHES, Server, heap, launch, open, show, waitText } from "./support.mjs";

const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const FIRST = "shop/checkout";
const SCHEMES = ["light", "dark"];
const WIDTHS = [360, 768, 1440, 2560];

let browser;
let server;

before(async () => {
  browser = await launch();
  server = await Server.start();
});

after(async () => {
  await browser?.close();
  await server?.stop();
});

// The violations of the rules of WCAG 2.1, levels A and AA.
async function violations(page) {
  const results = await page.evaluate(() =>
    globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"] }),
  );
  return results.violations.flatMap((rule) => rule.nodes.map((node) => `${rule.id}: ${node.html} (${node.failureSummary})`));
}

const focused = (page) => page.evaluate(() => document.activeElement.textContent || document.activeElement.id);

test("no view has a violation of WCAG, light or dark, wide or narrow", async () => {
  const page = await open(browser, server.url);
  // The page's own policy forbids code that is not a file of its own; the debugger may evaluate it.
  await page.evaluate(AXE);
  for (const scheme of SCHEMES) {
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    for (const width of [360, 1440]) {
      await page.setViewport({ width, height: 900 });
      for (const hash of HASHES) {
        await show(page, hash);
        assert.deepEqual(await violations(page), [], `${hash} ${scheme} ${width}`);
      }
    }
  }
  await page.keyboard.press("?");
  await page.waitForSelector("dialog[open]");
  assert.deepEqual(await violations(page), [], "the help");
  assert.deepEqual(page.complaints, []);
  await page.close();
});

test("every view is valid HTML", async () => {
  const page = await open(browser, server.url);
  const validator = new HtmlValidate({
    extends: ["html-validate:recommended"],
    // Widths of bars are set by script, which the page's policy allows; the fragment is the page's own.
    rules: { "no-inline-style": "off", "attribute-boolean-style": "off", "no-trailing-whitespace": "off", "doctype-style": "off", "void-style": "off", "long-title": "off" },
  });
  for (const hash of HASHES) {
    await show(page, hash);
    const report = await validator.validateString(`<!DOCTYPE html>${await page.evaluate(() => document.documentElement.outerHTML)}`);
    const messages = report.results.flatMap((result) => result.messages.map((message) => `${message.ruleId}: ${message.message} (${message.selector})`));
    assert.equal(messages.join("\n"), "", hash);
  }
  await page.close();
});

test("nothing is wider than the screen, from a phone to a wall", async () => {
  const page = await open(browser, server.url);
  for (const width of WIDTHS) {
    await page.setViewport({ width, height: 900 });
    for (const hash of HASHES) {
      await show(page, hash);
      const over = await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
      assert.ok(over <= 0, `${hash} is ${over} px wider than ${width} px`);
    }
  }
  await page.close();
});

test("everything can be done by keyboard", async () => {
  const page = await open(browser, server.url);
  await page.keyboard.press("Tab");
  assert.equal(await focused(page), "Skip to the content");
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "main");
  await page.keyboard.press("?");
  await page.waitForSelector("dialog[open]");
  await page.keyboard.press("Escape");
  await page.waitForSelector("dialog:not([open])");
  await page.keyboard.press("/");
  assert.equal(await page.evaluate(() => document.activeElement.id), "filter");
  await page.keyboard.type("checkout open j");
  await waitText(page, ".empty", "No breaker matches");
  await page.keyboard.press("Backspace");
  await page.keyboard.press("Backspace");
  await waitText(page, "[role=status]", "1 of 12 breakers");
  await page.keyboard.press("Escape");
  await page.keyboard.press("j");
  assert.equal(await focused(page), FIRST);
  await page.keyboard.press("Enter");
  await waitText(page, "h1", FIRST);
  await page.keyboard.press("Escape");
  await page.waitForSelector("table.breakers");
  await waitText(page, "[role=status]", "1 of 12 breakers");
  await page.$eval("#filter", (input) => input.select());
  await page.keyboard.press("Backspace");
  await page.keyboard.press("Escape");
  await page.keyboard.press("j");
  await page.keyboard.press("j");
  const second = await focused(page);
  await page.keyboard.press("k");
  assert.notEqual(await focused(page), second);
  for (const [key, view] of [["n", "table.nodes"], ["e", "table.events"], ["b", "table.breakers"]]) {
    await page.keyboard.press("g");
    await page.keyboard.press(key);
    await page.waitForSelector(view);
  }
  assert.deepEqual(page.complaints, []);
  await page.close();
});

test("a number of the summary filters, and a filter that is cleared can be set again", async () => {
  const page = await open(browser, server.url);
  const click = () => page.$$eval(".strip button", (buttons) => buttons.find((button) => button.textContent.includes("open")).click());
  for (let round = 0; round < 2; round++) {
    await click();
    await waitText(page, "[role=status]", "2 of 12 breakers");
    await page.$eval("#filter", (input) => input.select());
    await page.keyboard.press("Backspace");
    await waitText(page, "[role=status]", "12 breakers");
  }
  await page.close();
});

test("the keys can be switched off", async () => {
  const page = await open(browser, server.url);
  await page.keyboard.press("?");
  await page.waitForSelector("dialog[open]");
  await page.click("#keys-on");
  await page.keyboard.press("Escape");
  await page.keyboard.press("g");
  await page.keyboard.press("n");
  await page.click("button.help");
  assert.match(page.url(), /#\/$/);
  await page.click("#keys-on");
  await page.close();
});

test("the page asks no other server for anything", async () => {
  const page = await open(browser, server.url);
  for (const hash of HASHES) {
    await show(page, hash);
  }
  const others = page.requests.filter((url) => new URL(url).origin !== new URL(server.url).origin);
  assert.deepEqual(others, []);
  // The policy of the page forbids it, too: the harmless address is not asked.
  const outcome = await page.evaluate(() => fetch("http://127.0.0.2:9/").then(() => "asked", () => "refused"));
  assert.equal(outcome, "refused");
  assert.match(page.complaints.join(" "), /Content Security Policy/);
  await page.close();
});

test("one look answers what failed, since when, who is affected, what breaker does, and how to stop it", async () => {
  const page = await open(browser, server.url, "#/breaker/shop%2Fcheckout");
  await page.waitForSelector("table.backends");
  const text = await page.evaluate(() => document.querySelector("main").innerText);
  for (const words of ["L4CON connection refused", "2 min ago", "New connections go to the backup (4 of 4 Up)", "flows on the backup", "kubectl breaker trip shop/checkout"]) {
    assert.ok(text.includes(words) || (words.endsWith("ago") && /\d+ (s|min) ago/.test(text)), `${words} is missing in:\n${text}`);
  }
  await page.close();
});

test("a command is copied", async () => {
  const page = await open(browser, server.url, "#/breaker/shop%2Fcheckout");
  await browser.defaultBrowserContext().overridePermissions(new URL(server.url).origin, ["clipboard-read", "clipboard-write", "clipboard-sanitized-write"]);
  await page.waitForSelector(".commands button");
  await page.bringToFront();
  await page.click(".commands button");
  await waitText(page, ".commands [role=status]", "Copied");
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "kubectl breaker trip shop/checkout --for 10m --reason why");
  await page.close();
});

test("a breaker that opens comes first, and screen readers hear of it", async () => {
  const own = await Server.start();
  const page = await open(browser, own.url);
  assert.equal(await own.tell("open/internal/images"), "open");
  await waitText(page, "[aria-live=polite]", "internal/images is Open now");
  const names = await page.$$eval("a.name", (links) => links.map((link) => link.textContent));
  assert.deepEqual(names.slice(0, 3), ["shop/payments", "internal/images", "shop/checkout"]);
  assert.match(await page.title(), /^\(3 open\)/);
  await show(page, "#/events");
  await waitText(page, "table.events", "internal/images");
  await page.close();
  await own.stop();
});

test("the page says how old its data is when the agent hangs", async () => {
  const own = await Server.start();
  const page = await open(browser, own.url);
  await own.tell("rest/true");
  await page.waitForSelector("body.stale .age.old");
  assert.match(await page.$eval(".age", (node) => node.textContent), /^\d+ s old; trying again$/);
  await own.tell("rest/false");
  await page.waitForSelector("body:not(.stale) .age.live");
  await page.close();
  await own.stop();
});

test("a stream that is cut is resumed, with the state of then", async () => {
  const first = await Server.start();
  const page = await open(browser, first.url);
  await first.stop();
  await page.waitForSelector("body.stale .age.old");
  const second = await Server.start({ port: first.port });
  await page.waitForSelector("body:not(.stale) .age.live");
  await second.tell("open/media/sessions");
  await waitText(page, "tr.attention-Open", "media/sessions");
  const errors = page.complaints.filter((complaint) => !/ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED_ENCODING|CONNECTION_RESET)/.test(complaint));
  assert.deepEqual(errors, []);
  await page.close();
  await second.stop();
});

test("a thousand breakers on a hundred nodes stay usable, and the heap does not grow", async () => {
  const own = await Server.start({ breakers: 1000, nodes: 100 });
  const page = await open(browser, own.url);
  assert.equal(await page.$$eval("a.name", (links) => links.length), 100, "the first rows");
  const used = async () => {
    await page.evaluate(() => new Promise((resolve) => setTimeout(resolve, 10000)));
    return heap(page);
  };
  const before = await used();
  const later = await used();
  assert.ok(later < before * 1.3, `${before} bytes, ${later} bytes ten seconds later`);
  await waitText(page, "button", "Show 900 more");
  await page.$$eval("button", (buttons) => buttons.find((button) => button.textContent.includes("900")).click());
  await page.waitForFunction(() => document.querySelectorAll("a.name").length === 1000);
  await show(page, "#/nodes");
  assert.equal(await page.$$eval(".matrix thead th", (cells) => cells.length), 101);
  await page.close();
  await own.stop();
});
