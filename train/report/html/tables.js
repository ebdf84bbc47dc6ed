"use strict";
// Tables of learners can be sorted by any column; what is not known stays below.

function valueOf(row, column) {
  const cell = row.cells[column];
  if (cell.classList.contains("number")) return cell.dataset.value ? Number(cell.dataset.value) : null;
  return cell.textContent.trim().toLowerCase();
}

function sortBy(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const numeric = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : !numeric;  // numbers begin with the largest
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const keyed = [...table.tBodies[0].rows].map(row => [valueOf(row, column), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = numeric ? a - b : a.localeCompare(b, undefined, {numeric: true});
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const press = make("button", {type: "button", onclick: () => sortBy(table, column)});
    press.append(...heading.childNodes);
    heading.append(press);
  });
}
