// A filter above every table of class "filterable": words to find, and the values of the rows' data-* attributes.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.filterable")) {
    const rows = [...table.tBodies[0].rows];
    const bar = document.createElement("div");
    bar.className = "table-filter";
    const words = Object.assign(document.createElement("input"), { type: "search", placeholder: "find words" });
    words.setAttribute("aria-label", "find words in the claims");
    const choices = ["chapter", "verdict"].map((name) => {
      const select = document.createElement("select");
      select.setAttribute("aria-label", `show one ${name}`);
      select.append(new Option(`every ${name}`, ""));
      for (const value of new Set(rows.map((row) => row.dataset[name]))) select.append(new Option(value, value));
      return [name, select];
    });
    const count = document.createElement("output");
    const apply = () => {
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !(
          wanted.every((word) => text.includes(word)) &&
          choices.every(([name, select]) => !select.value || row.dataset[name] === select.value)
        );
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length}`;
    };
    bar.append(words, ...choices.map(([, select]) => select), count);
    bar.addEventListener("input", apply);
    table.parentElement.before(bar);
    apply();
  }
});
