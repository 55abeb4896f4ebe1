// The card of one image in the gallery, during generation and afterwards.

import { announce, byId, copy, form } from "./dom.js";
import { ServerError } from "./errors.js";
import { curl, fillForm, send } from "./request.js";
import { eventsOf } from "./server.js";
import { blame } from "./validation.js";

// Cards of requests in progress, oldest first.
export const running = [];

class Card {
  constructor(request) {
    this.request = request;
    this.abort = new AbortController();
    this.root = byId("card").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.part(".prompt").textContent = request.fields.prompt ?? "";
    this.part(".cancel").onclick = () => this.abort.abort();
    this.part(".reuse").onclick = () => {
      fillForm(this.request);
      form.elements.prompt.focus();
    };
    this.part(".again").onclick = () => {
      const { seed, ...fields } = this.request.fields;
      generate({ ...this.request, fields });
    };
    this.part(".curl").onclick = async () => {
      const copied = await copy(curl(this.request));
      this.state(copied ? "Copied." : "The browser does not allow copying.");
      announce(this.part(".state").textContent);
    };
    byId("empty").hidden = true;
    byId("gallery").prepend(this.root);
  }

  state(text) {
    this.part(".state").textContent = text;
  }

  show({ b64_json, output_format, size }) {
    const image = this.part("img");
    image.src = `data:image/${output_format};base64,${b64_json}`;
    image.alt = this.request.fields.prompt;
    image.hidden = false;
    const canvas = this.part(".canvas");
    canvas.classList.add("seen");
    canvas.style.aspectRatio = size.replace("x", " / ");
  }

  progress({ step, total_steps, queue_position, eta_s }) {
    const bar = this.part("progress");
    bar.max = total_steps;
    bar.value = step;
    const left = eta_s >= 1 ? ` · ${Math.ceil(eta_s)} s left` : "";
    const before = queue_position ? `${queue_position} before you` : "next";
    const denoising = `step ${step} of ${total_steps}`;
    this.state(`${queue_position === null ? denoising : `waiting, ${before}`}${left}`);
  }

  completed(event) {
    this.show(event);
    const { fields, image, mask } = this.request;
    const steps = this.part("progress").max;
    fields.seed = event.seed;
    const total = event.timings.total_s.toFixed(1);
    const model = fields.model ? `${fields.model} · ` : ""; // of several
    this.part(".facts").textContent =
      `${model}${event.size.replace("x", " × ")} · ${steps} steps · seed ${event.seed} · ${total} s`;
    const warnings = this.part(".warnings");
    for (const text of event.warnings) {
      warnings.append(Object.assign(document.createElement("li"), { textContent: text }));
    }
    warnings.hidden = !event.warnings.length;
    const download = this.part(".download");
    download.href = this.part("img").src;
    download.download = `${event.seed}.${event.output_format}`;
    for (const selector of [".download", ".curl"]) this.part(selector).hidden = false;
    if (image && mask) {
      const link = this.part(".download-mask");
      link.href = URL.createObjectURL(mask);
      link.download = "mask.png"; // the name in the copied command
      link.hidden = false;
    }
    this.end("done", "");
    announce(`Finished: ${fields.prompt}`);
  }

  end(how, text) {
    this.root.classList.remove("generating");
    this.root.classList.add(how);
    this.state(text);
    this.part("progress").hidden = true;
    this.part(".cancel").hidden = true;
    for (const selector of [".reuse", ".again"]) this.part(selector).hidden = false;
    running.splice(running.indexOf(this), 1);
  }

  async run() {
    running.push(this);
    this.root.classList.add("generating");
    this.state("sent");
    try {
      const response = await send(this.request, this.abort.signal, (text) => this.state(text));
      for await (const event of eventsOf(response)) {
        if (event.error) throw new ServerError(event.error.message, event.error.param);
        if (event.type.endsWith(".progress")) this.progress(event);
        else if (event.type.endsWith(".partial_image")) this.show(event);
        else this.completed(event);
      }
      if (this.root.classList.contains("generating")) throw new ServerError("The connection was lost.", null);
    } catch (error) {
      if (this.abort.signal.aborted) {
        this.end("cancelled", "Cancelled.");
        announce("Cancelled.");
      } else {
        this.end("failed", error.message);
        announce(error.message);
        blame(error.param, error.message);
      }
    }
  }
}

export function generate(request) {
  new Card(request).run();
}
