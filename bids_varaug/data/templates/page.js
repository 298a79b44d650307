for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const rising = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.key;
    const order = (a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
      const x = Number(key(a)), y = Number(key(b));
      const up = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
      return rising ? up : -up;
    };
    const body = table.tBodies[0];
    Array.from(body.rows).sort(order).forEach((row) => body.appendChild(row));
  }));
}
const button = (text, act) => {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", () => act(made));
  return made;
};
const LONG = 8;  // rows from which on a filter helps
for (const table of document.querySelectorAll("table.sortable")) {
  const region = table.closest(".scroll"), name = region.getAttribute("aria-label");
  const rows = Array.from(table.tBodies[0].rows), tools = document.createElement("div");
  tools.className = "tools";
  if (rows.length >= LONG) {
    const filter = Object.assign(document.createElement("input"), { type: "search", placeholder: "Filter rows" });
    filter.setAttribute("aria-label", `Filter rows: ${name}`);
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    });
    tools.append(filter);
  }
  tools.append(button("Download CSV", () => {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const head = Array.from(table.tHead.rows[0].cells, (cell) => quoted(cell.textContent));
    // Shown rows in the order shown; numbers without separators of thousands.
    const written = (cell) => (cell.classList.contains("text") ? cell.textContent :
      cell.textContent.replaceAll(",", "").replace("−", "-").replace("∞", "inf"));
    const shown = Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
    const body = shown.map((row) => Array.from(row.cells, (cell) => quoted(written(cell))));
    const text = [head, ...body].map((row) => row.join(",") + "\n").join("");
    const link = document.createElement("a");
    link.download = `${document.title.split(":")[0]} ${name}.csv`.replace(/[^A-Za-z0-9.-]+/g, "_");
    link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(text);
    link.click();
  }));
  region.before(tools);
}
for (const figure of document.querySelectorAll("figure.mosaic")) {
  const toggle = button("Enlarge", () => {
    const large = figure.classList.toggle("large");
    toggle.textContent = large ? "Shrink" : "Enlarge";
    if (large) figure.querySelector(".frame").focus();  // arrow keys then move it
  });
  figure.querySelector("figcaption").append(" ", toggle);
  figure.querySelector("img").addEventListener("click", () => toggle.click());
}
addEventListener("beforeprint", () => document.querySelectorAll("details.figures").forEach((all) => { all.open = true; }));
// The clock has no part in the bytes of a page: equal runs write equal files.
for (const place of document.querySelectorAll("#written")) place.textContent = document.lastModified;
