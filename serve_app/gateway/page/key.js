// The dialog for the API key, which this tab keeps until it is closed.

import { byId } from "./dom.js";
import { KeyDeclined } from "./errors.js";

let keyQuestion = null;
// Open the dialog, once for all callers; resolve when there is a key to try.
export function askForKey(reason) {
  byId("key-reason").textContent = reason;
  if (!keyQuestion) {
    const dialog = byId("key-dialog");
    keyQuestion = new Promise((resolve, reject) => {
      byId("key-form").onsubmit = (event) => {
        event.preventDefault();
        sessionStorage.setItem("key", byId("key").value.trim());
        dialog.close("given");
      };
      dialog.onclose = () => {
        keyQuestion = null;
        if (dialog.returnValue === "given") {
          resolve();
          if (!byId("enter-key").hidden) byId("enter-key").click();
        } else reject(new KeyDeclined("This server requires an API key.", null));
        dialog.returnValue = "";
        byId("key").value = "";
        byId("key").setCustomValidity("");
      };
      dialog.showModal();
    });
  }
  return keyQuestion;
}
byId("no-key").addEventListener("click", () => byId("key-dialog").close());
byId("key").addEventListener("input", ({ target }) => {
  const sendable = /^[\x21-\x7e]*$/.test(target.value.trim()); // in a header
  target.setCustomValidity(sendable ? "" : "A key has ASCII letters, digits and signs only, and no spaces.");
});
