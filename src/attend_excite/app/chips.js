// The words of a prompt as buttons, and a strength for each that is chosen. Built with textContent alone:
// a prompt can come from anyone's link.
const chips = element.querySelector(".ae-chips");
const subjects = element.querySelector(".ae-subjects");
const note = element.querySelector(".ae-note");

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function change(index, changes) {
  const words = props.value.words.map((word, at) => (at === index ? { ...word, ...changes, touched: true } : word));
  props.value = { ...props.value, words };
}

function chip(word, index, colour) {
  const pieces = word.pieces.flatMap((piece, at) => (at ? [make("i", { textContent: "|" }), piece] : [piece]));
  if (!word.name) {
    return make("span", { className: word.pieces.length ? "ae-mark" : "ae-mark ae-cut", textContent: word.text });
  }
  const button = make("button", { type: "button", className: "ae-chip" }, ...pieces);
  button.dataset.key = `chip ${index}`;
  button.setAttribute("aria-pressed", word.chosen);
  button.title = word.pieces.length > 1 ? `The model reads ${word.pieces.length} tokens: ${word.pieces.join(", ")}` : "";
  if (word.chosen) button.dataset.subject = colour;
  if (word.negated) button.dataset.negated = "";
  button.onclick = () => {
    change(index, { chosen: !word.chosen, negated: false, target: 1 });
    show();
  };
  return button;
}

function strength(word, index, colour) {
  const wanted = make("output", {});
  const tell = (target) => {
    wanted.textContent = `${word.negated ? "at most" : "at least"} ${target.toFixed(2)}`;
  };
  tell(word.target);
  const range = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: word.target });
  range.dataset.key = `range ${index}`;
  range.setAttribute("aria-label", `attention to ${word.name}, ${word.negated ? "at most" : "at least"}`);
  range.oninput = () => {
    tell(range.valueAsNumber);
    change(index, { target: range.valueAsNumber });
  };
  const negate = make("button", { type: "button", className: "ae-negate", textContent: word.negated ? "avoid" : "show" });
  negate.dataset.key = `negate ${index}`;
  negate.title = "Whether the picture is to show it, or to be without it";
  negate.setAttribute("aria-label", `${word.name}: ${word.negated ? "avoid" : "show"}`);
  negate.onclick = () => {
    change(index, { negated: !word.negated, target: word.negated ? 1 : 0 });
    show();
  };
  const row = make("li", {}, make("b", { textContent: word.name }), negate, range, wanted);
  row.dataset.subject = colour;
  if (word.negated) row.dataset.negated = "";
  return row;
}

function show() {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const words = props.value?.words ?? [];
  let chosen = 0;
  const colours = words.map((word) => (word.chosen ? chosen++ % 6 : null));
  chips.replaceChildren(...words.map((word, index) => chip(word, index, colours[index])));
  const rows = words.map((word, index) => (word.chosen ? strength(word, index, colours[index]) : null));
  subjects.replaceChildren(...rows.filter(Boolean));
  note.textContent = props.value?.note ?? "";
  if (focused) element.querySelector(`[data-key="${focused}"]`)?.focus();
}

watch("value", show);
show();
