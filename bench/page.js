"use strict";
// Sorts by a click on a column head, filters by words, and shows or hides the less important columns.
// `#sort=COLUMN` or `#sort=-COLUMN` in the address sorts when the page loads, so that a link can contain
// the order. Without scripts the page shows all rows.
function valueOf(row, index) {
  const cell = row.cells[index];
  if (!("v" in cell.dataset)) return cell.textContent;
  return cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
}

function sortBy(table, index, descending) {
  const rows = [...table.tBodies[0].rows];
  const sign = descending ? -1 : 1;
  rows.sort((a, b) => {
    const x = valueOf(a, index), y = valueOf(b, index);
    if (typeof x === "string") return sign * x.localeCompare(y);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // NaN last
    return sign * (x - y);
  });
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, i) => cell.setAttribute("aria-sort",
    i !== index ? "none" : descending ? "descending" : "ascending"));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    cell.querySelector("button").addEventListener("click",
      () => sortBy(table, index, cell.getAttribute("aria-sort") === "ascending"));
    const wanted = new URLSearchParams(location.hash.slice(1)).get("sort") || "";
    if (wanted.replace(/^-/, "") === cell.dataset.name) sortBy(table, index, wanted[0] === "-");
  });
}

for (const box of document.querySelectorAll("input.filter")) {
  const rows = [...document.getElementById(box.dataset.table).tBodies[0].rows];
  const count = document.querySelector(`output[data-table="${box.dataset.table}"]`);
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
}

for (const box of document.querySelectorAll("input.more")) {
  box.addEventListener("change",
    () => document.getElementById(box.dataset.table).classList.toggle("wide", box.checked));
}
document.documentElement.dataset.ready = "yes";
