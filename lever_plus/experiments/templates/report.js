(function () {
  "use strict";
  var form = document.getElementById("filter");
  if (!form) { return; }
  var cards = Array.prototype.slice.call(document.querySelectorAll(".card"));
  var count = document.getElementById("shown"), total = document.getElementById("total");
  var counts = JSON.parse(form.getAttribute("data-counts"));
  function apply() {
    var wanted = form.elements.outcome.value, shot = form.elements.shot.value, shown = 0;
    cards.forEach(function (card) {
      card.hidden = wanted !== "all" && card.getAttribute("data-shot-" + shot) !== wanted;
      if (!card.hidden) { shown += 1; }
    });
    document.body.classList.toggle("filtered", wanted !== "all");
    count.textContent = shown;
    total.textContent = Object.keys(counts[shot]).reduce(function (sum, outcome) {
      return sum + (wanted === "all" || wanted === outcome ? counts[shot][outcome] : 0);
    }, 0);
  }
  form.addEventListener("change", apply);
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  });
  apply();
})();
