// The models: the choice of one, and the fields of the form that depend on it.

import { byId, offer } from "./dom.js";
import { KeyDeclined } from "./errors.js";
import { call, pause } from "./server.js";

// The choice; hidden and without options where there is one model.
const choice = byId("model-choice");

// The models as the server last listed them.
let models = [];

// The model that the form follows; of one that no replica has described yet, its name, state and limits.
let shown = {};

// Tasks of the model; empty until it is known.
export let tasks = [];

// Tasks that take a strength.
export let tasksWithStrength = [];

// True unless the server sends no previews, because it blocks flagged images.
export let previews = true;

// States for which the choice has words of its own.
const STATES = { at_zero: "at zero" };

// What the page shows of a model that no replica has described yet, by the state of its replicas.
const NOT_DESCRIBED = {
  at_zero: "it starts with the first request",
  failed: "it could not be started",
};

const chosenModel = () => models.find((one) => one.id === choice.value) ?? models[0];

let learning = null;
// List the models, again and again until the chosen one is described. The first choice is the first
// one that has run, or else the first one that did not fail.
export function learnModels() {
  learning ??= learn().finally(() => {
    learning = null;
  });
  return learning;
}

async function learn() {
  byId("enter-key").hidden = true;
  for (;;) {
    try {
      const response = await call("v1/models", {}, () => {
        byId("model").textContent = "The model is loading …";
      });
      models = (await response.json()).data;
      listModels();
      if (models.length) showChosen();
      else byId("model").textContent = "This API key may use no model of this server.";
      if (chosenModel()?.tasks) return;
    } catch (error) {
      byId("model").textContent = error.message;
      if (error instanceof KeyDeclined) {
        byId("enter-key").hidden = false;
        return;
      }
    }
    await pause(3);
  }
}

byId("enter-key").addEventListener("click", learnModels);

// Write the models and their states into the choice. What is chosen stays, if it is still there.
function listModels() {
  const several = models.length > 1 ? models : [];
  const before = choice.value;
  for (const option of [...choice.options]) {
    if (!several.some(({ id }) => id === option.value)) option.remove();
  }
  for (const { id, state } of several) {
    const option = optionOf(id) ?? choice.appendChild(new Option("", id));
    option.text = `${id} · ${STATES[state] ?? state}`;
  }
  byId("model-field").hidden = !several.length;
  if (several.length && !optionOf(before)) {
    const working = several.find((one) => one.tasks) ?? several.find((one) => one.state !== "failed");
    choice.value = (working ?? several[0]).id;
  }
}

const optionOf = (id) => [...choice.options].find((option) => option.value === id);

// Choose a model by its name, unless it is not in the list.
export function chooseModel(name) {
  if (!optionOf(name)) return;
  choice.value = name;
  showChosen();
  learnModels();
}

choice.addEventListener("change", () => chooseModel(choice.value));
choice.addEventListener("focus", learnModels); // for the states

// Whether the model edits images, with a mask or without.
export const takesImage = () => tasks.some((task) => task !== "text-to-image");

function showChosen() {
  const model = chosenModel();
  const what = model.pipeline ?? NOT_DESCRIBED[model.state] ?? "it is loading …";
  byId("model").textContent = `${model.id} · ${what}`;
  // A list that adds nothing leaves the form as it is.
  if (model.id !== shown.id || (model.tasks && !shown.tasks)) showForm(model);
}

// Offer the model's adapters, those on demand too.
async function offerAdapters(model) {
  let names = model.loras ?? [];
  if (model.loras_on_demand) {
    try {
      const response = await call(`v1/loras?model=${encodeURIComponent(model.id)}`, {});
      names = (await response.json()).data.map(({ id }) => id);
    } catch (error) {
      console.warn(error); // those of the start are offered
    }
    if (shown !== model) return; // another model was chosen meanwhile
  }
  offer(byId("lora"), names);
  byId("lora-fields").hidden = !names.length;
}

function showForm(model) {
  shown = model;
  tasks = model.tasks ?? [];
  tasksWithStrength = Object.keys(model.default_strengths ?? {});
  previews = model.safety !== "block";
  offer(byId("size"), model.tasks ? sizesOf(model) : [], (size) => size.replace("x", " × "));
  const steps = byId("num_inference_steps");
  steps.max = model.max_steps;
  steps.placeholder = model.default_steps ?? "";
  byId("prompt").maxLength = model.max_prompt_chars;
  offer(byId("scheduler"), model.schedulers ?? []);
  offerAdapters(model);
  byId("negative-field").hidden = model.takes_negative_prompt === false;
  byId("scheduler-field").hidden = !model.schedulers?.length;
  byId("source").hidden = !takesImage();
  byId("drop").textContent =
    `${tasks.includes("text-to-image") ? "Start from an image" : "This model needs an image"}: drop, paste or choose one`;
  byId("strength-field").hidden = !tasksWithStrength.length;
  for (const id of ["mask", "mask-hint", "brush-field", "clear-mask"]) {
    byId(id).hidden = !tasks.includes("inpainting");
  }
  const optional = tasks.includes("image-to-image");
  byId("without-mask").textContent = optional
    ? "Without a mask, the whole image is regenerated."
    : "This model needs a mask.";
}

// Square, portrait and landscape sizes, from half to twice the pixels of the model's default.
function sizesOf(model) {
  const [width, height] = model.default_size.split("x").map(Number);
  const snap = (side) => Math.max(1, Math.round(side / model.size_multiple)) * model.size_multiple;
  const sizes = [];
  for (const scale of [1, Math.SQRT1_2, Math.SQRT2]) {
    for (const shape of [1, Math.sqrt(2 / 3), Math.sqrt(3 / 2)]) {
      sizes.push([snap(width * scale * shape), snap((height * scale) / shape)]);
    }
  }
  const fits = ([w, h]) => w * h <= model.max_pixels && Math.max(w, h) <= model.max_side;
  return [...new Set(sizes.filter(fits).map((size) => size.join("x")))];
}
