// Create a batch: upload the file, then name it.

import { call } from "./api.js";
import { refresh } from "./console.js";
import { toast } from "./notices.js";

const form = document.querySelector("[data-batch-form]");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const upload = new FormData();
    upload.append("purpose", "batch");
    upload.append("file", form.elements.file.files[0]);
    const file = await call("POST", "/v1/files", upload);
    const { endpoint, completion_window } = form.elements;
    await call("POST", "/v1/batches", {
      input_file_id: file.id, endpoint: endpoint.value, completion_window: completion_window.value,
    });
    form.reset();
    toast("The batch was created");
    refresh();
  } catch (error) {
    toast(error.message, true);
  } finally {
    button.disabled = false;
  }
});
