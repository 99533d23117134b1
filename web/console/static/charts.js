// The plots of the overview: the last hour, from the samples that the background process takes.

import { call } from "./api.js";

const uPlot = window.uPlot;
const PERIOD_MS = 15_000;
const HEIGHT = 150;
const colours = { first: "--accent", second: "--decode", third: "--queue", bad: "--bad" };

const seconds = (value) => (value == null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);
const whole = (value) => (value == null ? "–" : Math.round(value).toLocaleString());
const gib = (value) => (value == null ? "–" : `${(value / 2 ** 30).toFixed(1)} GiB`);
const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);

const PLOTS = {
  tokens: [whole, ["tok/s", "first", (s) => s.tokens_per_s]],
  queue: [whole, ["waiting", "third", (s) => sum(s.waiting)], ["running", "second", (s) => s.running]],
  ttft: [seconds, ["p50", "second", (s) => s.ttft?.p50 ?? null], ["p99", "first", (s) => s.ttft?.p99 ?? null]],
  itl: [seconds, ["p50", "second", (s) => s.itl?.p50 ?? null], ["p99", "first", (s) => s.itl?.p99 ?? null]],
  ended: [
    whole,
    ["succeeded", "second", (s) => s.ended.succeeded ?? 0],
    ["failed or expired", "bad", (s) => (s.ended.failed ?? 0) + (s.ended.expired ?? 0)],
    ["cancelled", "third", (s) => s.ended.cancelled ?? 0],
  ],
  memory: [gib, ["in use", "first", (s) => s.memory_bytes]],
};

let samples = [];
const drawn = new Map();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function options(width, format, lines) {
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--border"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  return {
    width,
    height: HEIGHT,
    padding: [8, 26, 0, 0],
    cursor: { points: { size: 6 } },
    legend: { live: true },
    scales: { y: { range: (_, __, most) => [0, Math.max(most, 1e-9) * 1.1] } },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map((t) => new Date(t * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })), space: 60, size: 30 },
      { ...axis, values: (_, ticks) => ticks.map(format), size: 62 },
    ],
    series: [
      { label: "time", value: (_, t) => (t == null ? "–" : new Date(t * 1000).toLocaleTimeString()) },
      ...lines.map(([label, name]) => ({
        label, stroke: colour(colours[name]), width: 1.75, spanGaps: true, value: (_, value) => format(value),
        points: { show: (plot) => plot.data[0].length < 3 },
      })),
    ],
  };
}

function draw() {
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const [format, ...lines] = PLOTS[figure.dataset.chart];
    const place = figure.querySelector(".plot");
    drawn.get(figure)?.destroy();
    drawn.delete(figure);
    place.replaceChildren();
    const data = [samples.map((s) => s.at), ...lines.map(([, , read]) => samples.map(read))];
    if (!samples.length) {
      const note = document.createElement("p");
      note.className = "empty";
      note.textContent = "No samples yet: the background process takes one every 30 seconds.";
      place.append(note);
      continue;
    }
    const plot = new uPlot(options(place.clientWidth, format, lines), data, place);
    const showLatest = () => plot.setLegend({ idx: samples.length - 1 });
    plot.over.addEventListener("mouseleave", () => setTimeout(showLatest));
    setTimeout(showLatest);
    drawn.set(figure, plot);
    const latest = lines.map(([label, , read]) => `${label} ${format(read(samples.at(-1)))}`).join(", ");
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${figure.querySelector("figcaption").textContent}, latest: ${latest}`);
  }
}

async function load() {
  try {
    const next = (await call("GET", "/v1/overview")).samples;
    if (next.at(-1)?.at === samples.at(-1)?.at && drawn.size) return;
    samples = next;
    draw();
  } catch {
    // The service is away. The next round tries again.
  }
}

let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  draw();
});
document.addEventListener("themechange", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
load();
setInterval(() => document.hidden || load(), PERIOD_MS);
