(function () {
  "use strict";
  var store = document.getElementById("thumbnails");
  var pictures = store ? JSON.parse(store.textContent) : [];
  function fill() {  // each picture is in the page once; it is shown where its number is
    document.querySelectorAll("img[data-thumbnail]").forEach(function (img) {
      img.src = pictures[+img.getAttribute("data-thumbnail")];
      img.removeAttribute("data-thumbnail");
    });
  }
  var gallery = document.getElementById("cards");
  if (gallery) { gallery.addEventListener("toggle", fill); }
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
  window.addEventListener("beforeprint", fill);
  apply();
})();
