// The nodes: their agents, and a matrix of breakers and nodes.

import { Component, html } from "./preact.js";
import { Head, Problems, useFirst } from "./parts.js";
import { keyOf } from "./store.js";
import { LETTERS, ago } from "./words.js";

const FIRST_ROWS = 50;

class MatrixRow extends Component {
  shouldComponentUpdate(next) {
    return next.row !== this.props.row || next.nodes !== this.props.nodes;
  }

  render({ row, nodes }) {
    const key = keyOf(row);
    return html`<tr>
      <th scope="row"><a href="#/breaker/${encodeURIComponent(key)}">${key}</a></th>
      ${nodes.map((node, index) => {
        const { letter, word, kind } = LETTERS[row.onNodes?.[index] ?? "-"] ?? LETTERS["?"];
        return html`<td class=${kind} title="${key} on ${node.name}: ${word}" key=${node.name}>${letter}</td>`;
      })}
    </tr>`;
  }
}

function Matrix({ store }) {
  const [shown, more] = useFirst(store.sorted(""), FIRST_ROWS);
  return html`<h2 id="matrix">Breakers on nodes</h2>
    <p class="legend" aria-hidden="true">
      ${Object.values(LETTERS).map(({ letter, word, kind }) => html`<span key=${word}><b class="cell ${kind}">${letter}</b> ${word}</span>`)}
    </p>
    <section class="scroll" tabindex="0" aria-labelledby="matrix">
      <table class="matrix">
        <thead>
          <tr><th scope="col">Breaker</th>${store.nodes.map((node) => html`<th scope="col" key=${node.name}><span>${node.name}</span></th>`)}</tr>
        </thead>
        <tbody>${shown.map((row) => html`<${MatrixRow} key=${keyOf(row)} row=${row} nodes=${store.nodes} />`)}</tbody>
      </table>
    </section>
    ${more}`;
}

export function Nodes({ store }) {
  const now = store.now();
  const isCluster = store.scope?.kind === "Cluster";
  const nodes = [...store.nodes].sort((a, b) => Number(b.silent ?? false) - Number(a.silent ?? false) || (b.problems?.length ?? 0) - (a.problems?.length ?? 0));
  return html`<section aria-labelledby="nodes">
    <h1 id="nodes">${isCluster ? "Nodes" : "This node"}</h1>
    ${nodes.length === 0
      ? html`<p class="empty">No node reports.</p>`
      : html`<table class="nodes">
          <${Head} columns=${["Node", "Heard", "Agent", "Attached by", "Interfaces", "Services", "Open", "Flow table", "Problems"]} />
          <tbody>
            ${nodes.map(
              (node) => html`<tr key=${node.name}>
                <th scope="row" data-label="Node">${node.name}</th>
                <td data-label="Heard">${node.silent ? html`<span class="problem Error">silent</span> ` : null}${node.heard ? `${ago(node.heard, now)} ago` : "never"}</td>
                <td data-label="Agent">${node.version}</td>
                <td data-label="Attached by">${node.attach}</td>
                <td data-label="Interfaces" class="number">${node.interfaces}</td>
                <td data-label="Services" class="number">${node.services}</td>
                <td data-label="Open" class="number">${node.open}</td>
                <td data-label="Flow table" class="number">${node.fill === undefined ? "–" : `${node.fill} %`}</td>
                <td data-label="Problems" class="why">${node.problems?.length ? html`<${Problems} problems=${node.problems} />` : "none"}</td>
              </tr>`,
            )}
          </tbody>
        </table>`}
    ${isCluster && nodes.length ? html`<${Matrix} store=${store} />` : null}
  </section>`;
}
