const { models, rows } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
let show = "differ", limit = PAGE;

function matches(row) {
  const { tuned, quantized } = row.answers;
  if (show === "wrong" && row.right.quantized !== false) return false;
  if (show === "differ" && tuned === quantized) return false;
  const words = document.getElementById("search").value.toLowerCase();
  const texts = [row.prompt, row.reference, ...Object.values(row.answers)];
  return texts.join("\n").toLowerCase().includes(words);
}

function element(name, text, className) {
  const node = document.createElement(name);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

// Marks the part of a text between the beginning and the end that it shares with the other text.
function marked(text, other) {
  const node = document.createElement("dd");
  const [here, there] = [[...text], [...other]];  // characters: half of a pair is shown as a box
  let start = 0, end = 0;
  const shortest = Math.min(here.length, there.length);
  while (start < shortest && here[start] === there[start]) start++;
  while (end < shortest - start && here.at(-1 - end) === there.at(-1 - end)) end++;
  const stop = here.length - end;
  if (!text) node.append(element("span", "(empty)", "soft"));
  node.append(here.slice(0, start).join(""));
  if (start < stop) node.append(element("mark", here.slice(start, stop).join("")));
  node.append(here.slice(stop).join(""));
  return node;
}

function card(row) {
  const list = document.createElement("dl");
  list.append(element("dt", "prompt"), element("dd", row.prompt));
  list.append(element("dt", "reference"), element("dd", row.reference));
  for (const model of models.filter((name) => name in row.answers)) {
    const verdict = { true: "right", false: "wrong" }[row.right[model]];
    const other = { tuned: "quantized", quantized: "tuned" }[model];
    list.append(element("dt", model, verdict));
    list.append(marked(row.answers[model], row.answers[other] ?? row.answers[model]));
  }
  const node = element("div", "", "answer");
  node.append(list);
  return node;
}

function draw() {
  const kept = rows.filter(matches);
  document.getElementById("answers").replaceChildren(...kept.slice(0, limit).map(card));
  const words = document.getElementById("search").value;
  const which = { all: "", wrong: ": quantized is wrong", differ: ": tuned and quantized differ" }[show];
  document.getElementById("count").textContent =
    `${kept.length} of ${rows.length} rows${which}${words && `, with "${words}"`}`;
  document.getElementById("more").hidden = kept.length <= limit;
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

if (rows.length) {
  const buttons = document.querySelectorAll("button[data-show]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      [show, limit] = [button.dataset.show, PAGE];
      for (const each of buttons) each.setAttribute("aria-pressed", each === button);
      draw();
    });
  }
  document.getElementById("search").addEventListener("input", draw);
  document.getElementById("more").addEventListener("click", () => {
    limit += PAGE;
    draw();
  });
  addEventListener("beforeprint", () => {
    limit = Infinity;
    draw();
  });
  draw();
}
