"use strict";
// Draws the loads, colors the tokens, and says what is under the cursor. All data is in #data; nothing is fetched.
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("map");
const cell_says = document.getElementById("cell");
const token_says = document.getElementById("token");
const chosen_by = document.getElementById("by");
const tokens = [...document.querySelectorAll(".tokens span")];
const numLayers = data.layers.length, numExperts = data.experts;
const topShare = Math.max(...data.layers.map((l) => Math.max(...l.shares)));
const at = { layer: 0, expert: 0 };
let pinned = null; // {layer, expert} whose tokens are shown

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = (n) => n.toLocaleString("en");
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const hue = (i, n) => (n ? (360 * i) / n : (i * 137.508) % 360); // the golden angle keeps neighbors apart

// ---- the heat map -------------------------------------------------------------------------------------------------

const left = 34, bottom = 22;
let width = 0, rowHeight = 0;

function ramp() {
  const stops = [0, 1, 2, 3, 4].map((i) => {
    const hex = color(`--r${i}`).slice(1);
    return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
  });
  return (share) => {
    const t = (4 * Math.log1p(share)) / Math.log1p(topShare), i = Math.min(3, Math.floor(t));
    return `rgb(${stops[i].map((c, k) => Math.round(c + (t - i) * (stops[i + 1][k] - c))).join()})`;
  };
}

// Cells and numbers once per size and scheme; the cursor over a copy of them.
const base = document.createElement("canvas");

function draw() {
  const scale = window.devicePixelRatio || 1, full = canvas.clientWidth;
  rowHeight = Math.max(9, Math.min(26, 520 / numLayers));
  width = (full - left) / numExperts;
  const height = numLayers * rowHeight + bottom;
  canvas.style.height = `${height}px`;
  base.width = canvas.width = Math.round(full * scale);
  base.height = canvas.height = Math.round(height * scale);
  const pen = base.getContext("2d"), fill = ramp(), never = color("--never");
  pen.scale(scale, scale);
  const gap = width > 6 && rowHeight > 6 ? 1 : 0;
  data.layers.forEach((layer, y) => layer.shares.forEach((share, x) => {
    pen.fillStyle = share ? fill(share) : never;
    pen.fillRect(left + x * width, y * rowHeight, width - gap + (gap ? 0 : 0.5), rowHeight - gap);
  }));
  drawNumbers(pen, height);
  drawCursor();
}

function drawNumbers(pen, height) {
  pen.fillStyle = color("--soft");
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const everyLayer = Math.ceil(13 / rowHeight), everyExpert = 2 ** Math.max(0, Math.ceil(Math.log2(30 / width)));
  data.layers.forEach((layer, y) => {
    if (y % everyLayer === 0) pen.fillText(layer.layer, left - 6, (y + 0.5) * rowHeight);
  });
  pen.textAlign = "center";
  for (let x = 0; x < numExperts; x += everyExpert) {
    pen.fillText(x, left + (x + 0.5) * width, height - bottom / 2 + 2);
  }
}

function drawCursor() {
  const pen = canvas.getContext("2d"), scale = window.devicePixelRatio || 1;
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(base, 0, 0);
  pen.scale(scale, scale);
  outline(pen, at, color("--mark"));
  if (pinned) outline(pen, pinned, color("--mark"), 3);
}

function outline(pen, { layer, expert }, style, lineWidth = 1.5) {
  pen.strokeStyle = style;
  pen.lineWidth = lineWidth;
  pen.strokeRect(left + expert * width - 1, layer * rowHeight, width + 1, rowHeight - 1);
}

function sayCell() {
  const layer = data.layers[at.layer], e = at.expert, count = layer.counts[e];
  const parts = [`Layer ${layer.layer}, expert ${e}: chosen by ${number(count)} of ${number(data.tokens)} tokens, ` +
    `${layer.shares[e].toFixed(2)} × the mean load`];
  if (count) {
    parts.push(`mean weight ${layer.mean_weights[e].toFixed(3)}`);
    const by = layer.label_counts.map((row, i) => [row[e] / count, data.labels[i]]);
    by.sort((a, b) => b[0] - a[0]);
    parts.push(by.filter(([share]) => share).slice(0, 3).map(([s, name]) => `${name} ${percent(s)}`).join(", "));
  }
  cell_says.textContent = parts.join("; ") + ".";
}

function move(layer, expert) {
  at.layer = Math.max(0, Math.min(numLayers - 1, layer));
  at.expert = Math.max(0, Math.min(numExperts - 1, expert));
  drawCursor();
  sayCell();
}

function pin() {
  const again = pinned && pinned.layer === at.layer && pinned.expert === at.expert;
  pinned = again ? null : { ...at };
  if (!again) chosen_by.value = String(at.layer);
  paint();
  drawCursor();
}

function unpin() {
  pinned = null;
  paint();
  drawCursor();
}

function under(event) {
  const box = canvas.getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left - left) / width);
  const y = Math.floor((event.clientY - box.top) / rowHeight);
  return x >= 0 && x < numExperts && y >= 0 && y < numLayers ? [y, x] : null;
}

canvas.addEventListener("pointermove", (event) => {
  const place = under(event);
  if (place) move(...place);
});
canvas.addEventListener("click", (event) => {
  const place = under(event);
  if (place) { move(...place); pin(); }
});
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (step) move(at.layer + step[0], at.expert + step[1]);
  else if (event.key === "Home") move(at.layer, 0);
  else if (event.key === "End") move(at.layer, numExperts - 1);
  else if (event.key === "Enter" || event.key === " ") pin();
  else if (event.key === "Escape") unpin();
  else return;
  event.preventDefault();
});

// ---- the tokens ---------------------------------------------------------------------------------------------------

const chosen = (index, layer) => data.choices[index][layer]; // [[expert, ...], [weight, ...]]

function paint() {
  const by = chosen_by.value;
  tokens.forEach((span, index) => {
    const strong = (h) => `hsl(${h} 65% var(--tone))`;
    let h = hue(data.label_of[index], data.labels.length), strip = `${strong(h)} 0 100%`;
    if (by !== "label") {
      const [experts, weights] = chosen(index, Number(by)), sum = weights.reduce((a, b) => a + b, 0) || 1;
      let from = 0;
      h = hue(experts[weights.indexOf(Math.max(...weights))]);
      strip = experts.map((e, i) => {
        const to = from + (100 * weights[i]) / sum, part = `${strong(hue(e))} ${from.toFixed(1)}% ${to.toFixed(1)}%`;
        from = to;
        return part;
      }).join();
    }
    span.style.backgroundColor = `hsl(${h} 65% var(--tone) / var(--tint))`;
    span.style.backgroundImage = `linear-gradient(to right, ${strip})`;
    span.classList.toggle("hit", !!pinned && chosen(index, pinned.layer)[0].includes(pinned.expert));
  });
  document.querySelectorAll(".tokens").forEach((p) => p.classList.toggle("pinned", !!pinned));
}

function sayToken(index) {
  const layer = chosen_by.value === "label" ? at.layer : Number(chosen_by.value);
  const [experts, weights] = chosen(index, layer);
  const pairs = experts.map((e, i) => [weights[i], e]).sort((a, b) => b[0] - a[0]);
  const list = pairs.map(([w, e]) => `${e} (${w.toFixed(3)})`).join(", ");
  token_says.textContent = `${JSON.stringify(tokens[index].textContent)}, id ${data.ids[index]}, ` +
    `${data.labels[data.label_of[index]]}. Experts of layer ${data.layers[layer].layer} (weight): ${list}.`;
}

function focusToken(index) {
  if (index < 0 || index >= tokens.length) return;
  tokens.forEach((span) => { span.tabIndex = -1; });
  tokens[index].tabIndex = 0;
  tokens[index].focus();
}

tokens.forEach((span, index) => {
  span.tabIndex = index ? -1 : 0;
  span.addEventListener("pointerenter", () => sayToken(index));
  span.addEventListener("focus", () => sayToken(index));
  span.addEventListener("click", () => focusToken(index));
  span.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, ArrowUp: index - 10, ArrowDown: index + 10,
      Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined && event.key !== "Escape") return;
    event.preventDefault();
    if (to === undefined) unpin();
    else focusToken(to);
  });
});
chosen_by.addEventListener("change", paint);
new ResizeObserver(() => requestAnimationFrame(draw)).observe(canvas.parentElement);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
paint();
sayCell();
