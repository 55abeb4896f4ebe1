// Access to the document.

export const byId = (id) => document.getElementById(id);
export const form = byId("form");

export const announce = (text) => {
  byId("news").textContent = text;
};

// Copy to the clipboard. Browsers deny the API to pages over plain http from another machine.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const area = Object.assign(document.createElement("textarea"), { className: "quiet", value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

export function addOption(select, value, text = value) {
  select.append(new Option(text, value));
}

// Offer values after the first option, which is the default. A chosen one stays if it is offered.
export function offer(select, values, textOf = (value) => value) {
  const chosen = select.value;
  select.length = 1;
  for (const value of values) addOption(select, value, textOf(value));
  select.value = values.includes(chosen) ? chosen : "";
}
