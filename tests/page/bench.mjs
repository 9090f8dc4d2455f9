// Figures of the page: a large cluster beside a small one, and the heap over a minute.

import { Server, heap, launch, open } from "./support.mjs";

const RUNS = 5;
const SHAPES = { small: { breakers: 12, nodes: 3 }, large: { breakers: 1000, nodes: 100 } };
const MINUTE_MS = 60000;

const browser = await launch();
const servers = {};
const paints = { small: [], large: [] };
for (const [name, shape] of Object.entries(SHAPES)) {
  servers[name] = await Server.start(shape);
}

// Milliseconds from the request to the first rows.
async function firstRows(url) {
  const page = await browser.newPage();
  await page.goto(url);
  await page.waitForSelector("a.name");
  const time = await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => resolve(performance.now()))));
  await page.close();
  return time;
}

for (let run = 0; run <= RUNS; run++) {
  for (const name of Object.keys(SHAPES)) {
    const time = await firstRows(servers[name].url);
    // The first run warms the browser up.
    if (run > 0) {
      paints[name].push(time);
    }
  }
}
const median = (times) => times.sort((a, b) => a - b)[Math.floor(times.length / 2)];
const [small, large] = [median(paints.small), median(paints.large)];
console.log(`first rows, 1,000 breakers on 100 nodes: ${large.toFixed(0)} ms; 12 on 3: ${small.toFixed(0)} ms; ratio ${(large / small).toFixed(2)}`);

const page = await open(browser, servers.large.url);
await new Promise((resolve) => setTimeout(resolve, 5000));
const before = await heap(page);
await new Promise((resolve) => setTimeout(resolve, MINUTE_MS));
const after = await heap(page);
console.log(`heap with 1,000 breakers: ${(after / 2 ** 20).toFixed(1)} MiB after a minute of the stream; ratio to its beginning ${(after / before).toFixed(2)}`);
await browser.close();
await Promise.all(Object.values(servers).map((server) => server.stop()));
