// The limits of an API key, and how much of them is in use.

import { call } from "./api.js";

const list = document.querySelector("[data-limits]");
const number = (value) => (value == null ? "unlimited" : value.toLocaleString());

const share = ({ used, limit }) => (limit == null ? `${number(used)}, unlimited` : `${number(used)} of ${number(limit)}`);

function fact(name, text) {
  const group = document.createElement("div");
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = name;
  value.textContent = text;
  group.append(term, value);
  return group;
}

try {
  const limits = await call("GET", list.dataset.limits);
  const waiting = Object.values(limits.queued_jobs.used).reduce((sum, count) => sum + count, 0);
  list.replaceChildren(
    fact("Requests", limits.requests.limit),
    fact("Tokens per minute", limits.tokens_per_minute.limit == null ? "unlimited" : `${number(limits.tokens_per_minute.remaining)} of ${number(limits.tokens_per_minute.limit)} left`),
    fact("Tokens today", share(limits.tokens_per_day)),
    fact("Waiting jobs", `${number(waiting)} of ${number(limits.queued_jobs.limit)} per model`),
    fact("Running jobs", share(limits.running_jobs)),
    fact("Weight", String(limits.weight)),
    fact("Highest class", limits.max_priority),
  );
} catch (error) {
  list.replaceChildren(fact("Not available", error.message));
}
