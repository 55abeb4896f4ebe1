// Error messages at the fields of the form.

import { byId, form } from "./dom.js";

// Show the error of a field; do nothing if the form has no such field.
export function blame(param, message) {
  const [name] = param?.split(".") ?? []; // lora for lora.ink
  const field = form.elements[name];
  if (!field?.after) return;
  byId(`${name}-wrong`)?.remove();
  const text = Object.assign(document.createElement("p"), { className: "wrong", textContent: message });
  text.id = `${name}-wrong`;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", text.id);
  field.closest("details")?.setAttribute("open", "");
  field.after(text);
}

// Remove all error messages.
export function clearErrors() {
  for (const text of form.querySelectorAll(".wrong")) text.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}
