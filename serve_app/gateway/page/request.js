// A request: from the form, to the form, to the server, and as a curl command.

import { addOption, byId, form } from "./dom.js";
import { chooseModel, previews, tasksWithStrength } from "./model.js";
import { call } from "./server.js";
import {
  maskFile,
  removeSource,
  setStrength,
  source,
  sourceInUse,
  startFrom,
  strength,
  taskOfSource,
} from "./source.js";

const TEXTS = ["model", "prompt", "size", "negative_prompt", "scheduler", "acceleration"];
const NUMBERS = ["num_inference_steps", "guidance_scale", "seed", "strength"];

// Whether the chosen model has no use for a field, which keeps its value for another model.
export const unused = (field) => Boolean(field.closest("[hidden]"));

// Return {fields, image, mask}: all that generates the same image again, except a random seed.
export async function readForm() {
  await source?.shown;
  const fields = {};
  for (const name of [...TEXTS, ...NUMBERS]) {
    const { value } = form.elements[name];
    if (value !== "" && !unused(form.elements[name])) fields[name] = NUMBERS.includes(name) ? Number(value) : value;
  }
  const takesStrength = tasksWithStrength.includes(taskOfSource());
  if (!takesStrength || !strength.dataset.touched) delete fields.strength;
  const lora = form.elements.lora.value;
  if (lora) fields.lora = { [lora]: Number(byId("lora-scale").value) };
  const used = sourceInUse();
  return {
    fields,
    image: used?.file ?? null,
    mask: used?.brushed ? await maskFile() : null,
  };
}

// Fill in the form from a request.
export function fillForm({ fields, image, mask }) {
  chooseModel(fields.model);
  for (const name of [...TEXTS, ...NUMBERS]) {
    const field = form.elements[name];
    if (name === "size" && ![...field.options].some((option) => option.value === fields.size)) {
      if (fields.size) addOption(field, fields.size, fields.size.replace("x", " × "));
    }
    if (!["model", "strength"].includes(name)) field.value = fields[name] ?? "";
  }
  if (image) startFrom(image, mask);
  else removeSource();
  setStrength(fields.strength ?? null);
  const [[lora, scale]] = [...Object.entries(fields.lora ?? {}), ["", 1]];
  form.elements.lora.value = lora;
  byId("lora-scale").value = scale;
}

export function send({ fields, image, mask }, signal, onWait) {
  const live = { stream: true, progress: true, partial_images: previews ? 3 : 0 };
  if (!image) {
    const body = JSON.stringify({ ...fields, ...live });
    const headers = { "Content-Type": "application/json" };
    return call("v1/images/generations", { method: "POST", headers, body, signal }, onWait);
  }
  const body = new FormData();
  for (const [name, value] of Object.entries({ ...fields, ...live })) {
    body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  body.append("image", image, image.name || "image");
  if (mask) body.append("mask", mask, "mask.png");
  return call("v1/images/edits", { method: "POST", body, signal }, onWait);
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

// Return the command that sends the request.
export function curl({ fields, image, mask }) {
  const lines = [`curl -sS ${quoted(new URL(image ? "v1/images/edits" : "v1/images/generations", location.href))}`];
  if (sessionStorage.getItem("key")) lines.push('-H "Authorization: Bearer $KEY"');
  if (!image) {
    lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(fields))}`);
  } else {
    const name = (image.name || "image.png").replaceAll(/[\\"]/g, "\\$&");
    lines.push(`-F ${quoted(`image=@"${name}"`)}`);
    if (mask) lines.push("-F mask=@mask.png");
    for (const [name, value] of Object.entries(fields)) {
      const text = typeof value === "object" ? JSON.stringify(value) : value;
      lines.push(`--form-string ${quoted(`${name}=${text}`)}`);
    }
  }
  return lines.join(" \\\n  ");
}
