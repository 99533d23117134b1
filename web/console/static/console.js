// On every page: the menu, the theme, live regions, and buttons that call the API.

import { call, callLine } from "./api.js";
import { copy, toast } from "./notices.js";

const RELOAD_AFTER_MS = 150;

// Live regions: the page is fetched again, and its parts with the attribute `data-region` replace those shown.

let refreshing = false;
const shown = new WeakMap();

export async function refresh() {
  if (refreshing) return;
  refreshing = true;
  try {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (response.redirected || !response.ok) return;
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    for (const region of document.querySelectorAll("[data-region]")) replace(region, page.getElementById(region.id));
    const live = page.getElementById("main").dataset.live ?? "";
    document.getElementById("main").dataset.live = live;
    localTimes();
  } catch {
    // The service is away. The next round tries again.
  } finally {
    refreshing = false;
  }
}

function replace(region, next) {
  if (!next || shown.get(region) === next.innerHTML) return;
  shown.set(region, next.innerHTML);
  const focused = region.contains(document.activeElement) ? focusPath(region, document.activeElement) : undefined;
  region.replaceChildren(...next.childNodes);
  if (focused !== undefined) region.querySelectorAll("a, button, input, select")[focused]?.focus();
}

function focusPath(region, element) {
  const index = [...region.querySelectorAll("a, button, input, select")].indexOf(element);
  return index < 0 ? undefined : index;
}

async function live() {
  for (;;) {
    const period = Number(document.getElementById("main").dataset.live) || 0;
    await new Promise((resolve) => setTimeout(resolve, period || 1000));
    if (period && !document.hidden && !document.querySelector("dialog[open]")) await refresh();
  }
}

// Times are written as ages; a pointer shows them in the time zone of the browser.

function localTimes() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    time.title = new Date(time.dateTime).toLocaleString();
  }
}

// Buttons

async function act(button) {
  if (button.dataset.confirm && !(await confirmed(button.dataset.confirm, button.textContent.trim()))) return;
  button.disabled = true;
  try {
    await callLine(button.dataset.action, button.dataset.body ? JSON.parse(button.dataset.body) : undefined);
    if (button.dataset.done) toast(button.dataset.done);
    if (button.dataset.go) location.assign(button.dataset.go);
    else setTimeout(refresh, RELOAD_AFTER_MS);
  } catch (error) {
    toast(error.message, true);
  } finally {
    button.disabled = false;
  }
}

function confirmed(question, verb) {
  const dialog = document.createElement("dialog");
  const text = document.createElement("p");
  text.textContent = question;
  text.id = "question";
  dialog.setAttribute("aria-labelledby", text.id);
  const form = document.createElement("form");
  form.method = "dialog";
  form.className = "card-actions";
  for (const [value, label, kind] of [["yes", verb, "danger"], ["", "Back", ""]]) {
    const button = document.createElement("button");
    button.value = value;
    button.textContent = label;
    button.className = kind;
    form.append(button);
  }
  dialog.append(text, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
  });
}

async function retry(jobId, follow) {
  try {
    const job = await call("POST", `/v1/jobs/${jobId}/retry`);
    if (follow) location.assign(`/console/jobs/${job.id}`);
    return true;
  } catch (error) {
    toast(error.message, true);
    return false;
  }
}

async function retryShown(button) {
  const ids = [...document.querySelectorAll("[data-job]:has([data-retry])")].map((row) => row.dataset.job);
  if (!(await confirmed(`Run the ${ids.length} failed jobs on this page again?`, "Run again"))) return;
  button.disabled = true;
  let done = 0;
  for (const id of ids) done += Number(await retry(id, false));
  button.disabled = false;
  toast(`${done} of ${ids.length} jobs were submitted again`);
  refresh();
}

function switchTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.cookie = `mlxq_theme=${theme}; path=/; max-age=31536000; samesite=strict`;
  document.querySelector('meta[name="color-scheme"]').content = theme === "auto" ? "light dark" : theme;
  document.dispatchEvent(new Event("themechange"));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const data = button.dataset;
  if (data.action) act(button);
  else if (data.retry) retry(data.retry, true);
  else if ("retryShown" in data) retryShown(button);
  else if (data.copy) copy(data.copy);
  else if (data.open) document.getElementById(data.open).showModal();
  else if ("close" in data) button.closest("dialog").close();
  else if ("menu" in data) {
    const open = document.getElementById("navigation").classList.toggle("open");
    button.setAttribute("aria-expanded", String(open));
  }
});
document.addEventListener("change", (event) => {
  if (event.target.matches("[data-theme-switch]")) switchTheme(event.target.value);
  else if (event.target.matches("[data-filters] select")) event.target.form.requestSubmit();
});
document.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-filters]")) return;
  for (const field of event.target.elements) if (field.name && !field.value) field.disabled = true;
});
window.addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("[data-filters] :disabled")) field.disabled = false;
});

// A search that has found nothing yet continues with older jobs.
const further = document.querySelector("[data-continue]");
if (further) location.replace(further.dataset.continue);

for (const region of document.querySelectorAll("[data-region]")) shown.set(region, region.innerHTML);
localTimes();
live();
