"use strict";
(function () {
  const filters = Array.from(document.querySelectorAll("[data-filter]"));
  const exchanges = Array.from(document.querySelectorAll(".exchange"));
  const count = document.querySelector("[data-count]");
  const more = document.querySelector(".more");
  const first = 12;
  let all = false;
  if (!filters.length) return;
  function apply() {
    let shown = 0;
    for (const exchange of exchanges) {
      const fits = filters.every(function (filter) {
        const wanted = filter.value;
        if (!wanted) return true;
        if (filter.dataset.filter === "words") return exchange.textContent.toLowerCase().includes(wanted.toLowerCase());
        return exchange.dataset[filter.dataset.filter] === wanted;
      });
      exchange.hidden = !fits || (!all && shown >= first);
      if (fits) shown += 1;
    }
    count.textContent = shown + " of " + exchanges.length + " fit";
    more.hidden = all || shown <= first;
    more.textContent = "Show all " + shown;
  }
  for (const filter of filters) filter.addEventListener("input", apply);
  more.addEventListener("click", function () { all = true; apply(); });
  document.querySelector(".filters").hidden = false;
  apply();
})();
