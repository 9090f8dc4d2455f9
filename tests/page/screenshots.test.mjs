// Pictures of the page: three for the documents, which must stay true, and all views for whoever wants to look.

import assert from "node:assert/strict";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import pixelmatch from "pixelmatch";
import { PNG } from "pngjs";
import { HASHES, Server, launch, open, show } from "./support.mjs";

// Of the pixels, this part may differ: times, numbers, and fonts of another system.
const TOLERANCE = 0.08;
const OUT = new URL("../../target/page/", import.meta.url);
const DOCS = new URL("../../docs/images/", import.meta.url);
const DETAIL = "#/breaker/shop%2Fcheckout";
const WIDTHS = [360, 768, 1440];

let browser;
let server;
let page;

before(async () => {
  await mkdir(OUT, { recursive: true });
  await mkdir(DOCS, { recursive: true });
  browser = await launch();
  server = await Server.start();
  page = await open(browser, server.url);
  await server.tell("replay");
});

after(async () => {
  await browser?.close();
  await server?.stop();
});

async function picture(hash, scheme, width, height) {
  await page.emulateMediaFeatures([
    { name: "prefers-color-scheme", value: scheme },
    { name: "prefers-reduced-motion", value: "reduce" },
  ]);
  await page.setViewport({ width, height });
  await show(page, hash);
  if (hash === DETAIL) {
    await page.waitForSelector(".chart canvas");
    // A chart of check times needs some of them.
    await page.waitForFunction(() => document.querySelectorAll(".chart")[1]?.querySelectorAll("tbody tr").length >= 3);
  }
  await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
}

for (const [name, hash, scheme, width, height] of [
  ["page-overview.png", "#/", "light", 1280, 640],
  ["page-breaker.png", DETAIL, "dark", 1280, 1000],
  ["page-phone.png", "#/", "light", 360, 720],
]) {
  test(`docs/images/${name} shows the page as it is`, async () => {
    await picture(hash, scheme, width, height);
    const now = await page.screenshot();
    const file = new URL(name, DOCS);
    const known = await readFile(file).catch(() => undefined);
    if (process.env.BREAKER_UPDATE || !known) {
      await writeFile(file, now);
      return;
    }
    const [a, b] = [PNG.sync.read(known), PNG.sync.read(Buffer.from(now))];
    assert.deepEqual([b.width, b.height], [a.width, a.height]);
    const differ = pixelmatch(a.data, b.data, null, a.width, a.height, { threshold: 0.2 }) / (a.width * a.height);
    await writeFile(new URL(name, OUT), now);
    assert.ok(differ <= TOLERANCE, `${(differ * 100).toFixed(1)} % of the pixels differ from target/page/${name}; if that is right, run: BREAKER_UPDATE=1 cargo xtask test page`);
  });
}

test("all views are in target/page, light and dark, at three widths", async () => {
  for (const hash of HASHES) {
    for (const scheme of ["light", "dark"]) {
      for (const width of WIDTHS) {
        await picture(hash, scheme, width, 900);
        const name = `${hash.split("/")[1] || "breakers"}-${scheme}-${width}.png`;
        await page.screenshot({ path: new URL(name, OUT).pathname, fullPage: true });
      }
    }
  }
  assert.deepEqual(page.complaints, []);
});
