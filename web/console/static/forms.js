// Forms that send JSON to the API, and secrets that are shown once.

import { callLine } from "./api.js";
import { refresh } from "./console.js";
import { copy, toast } from "./notices.js";

const dialog = document.querySelector("[data-secret-dialog]");

function showSecret(text) {
  dialog.querySelector("[data-secret-text]").textContent = text;
  dialog.showModal();
}

/** Return the fields of a form as JSON: checkboxes of one name and words as lists, other empty fields left out. */
function fieldsOf(form) {
  const body = {};
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") {
      body[field.name] ??= [];
      if (field.checked) body[field.name].push(field.value);
    } else if ("list" in field.dataset) {
      body[field.name] = field.value.split(/[\s,]+/).filter(Boolean);
    } else if (field.value !== "") {
      body[field.name] = field.type === "number" ? Number(field.value) : field.value;
    }
  }
  return body;
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.dataset.jsonForm) return;
  event.preventDefault();
  try {
    const answer = await callLine(form.dataset.jsonForm, fieldsOf(form));
    toast(form.dataset.done);
    form.closest("dialog")?.close();
    form.reset();
    await refresh();
    if (form.dataset.secretField) showSecret(answer[form.dataset.secretField]);
  } catch (error) {
    toast(error.message, true);
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-secret], [data-copy-secret]");
  if (!button) return;
  if ("copySecret" in button.dataset) return copy(dialog.querySelector("[data-secret-text]").textContent);
  const line = button.dataset.secret;
  try {
    showSecret((await callLine(line, line.startsWith("POST") ? {} : undefined)).secret);
  } catch (error) {
    toast(error.message, true);
  }
});
