// The page's entry: the form's submission and the keyboard shortcuts.

import { generate, running } from "./card.js";
import { byId, form } from "./dom.js";
import { learnModels } from "./model.js";
import { readForm, unused } from "./request.js";
import { missingInput, source } from "./source.js";
import { blame, clearErrors } from "./validation.js";

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  clearErrors();
  await source?.shown;
  const missing = missingInput();
  const wrong = [...form.elements].find((field) => !unused(field) && !field.validity.valid);
  if (!form.elements.prompt.value.trim()) {
    blame("prompt", "Describe the image.");
    form.elements.prompt.focus();
  } else if (wrong) {
    blame(wrong.name, wrong.validationMessage);
    wrong.focus();
  } else if (missing) {
    blame("file", missing.message);
    missing.field.focus();
  } else {
    generate(await readForm());
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape" && !byId("key-dialog").open) running.at(-1)?.abort.abort();
});

learnModels();
