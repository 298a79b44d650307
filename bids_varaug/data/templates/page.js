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
for (const image of document.querySelectorAll("figure.mosaic img")) {
  image.addEventListener("click", () => image.closest("figure").classList.toggle("large"));
}
