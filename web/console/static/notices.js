// Short messages in the corner, and the clipboard.

/** Show a message for some seconds. */
export function toast(text, isError = false) {
  const note = document.createElement("div");
  note.className = isError ? "toast error" : "toast";
  note.textContent = text;
  document.getElementById("toasts").append(note);
  setTimeout(() => note.remove(), isError ? 8000 : 4000);
}

/** Copy a text, also on pages without TLS, where browsers have no clipboard API. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}
