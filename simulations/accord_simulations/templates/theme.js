(function () {
  var root = document.documentElement, order = ["auto", "light", "dark"], mode = "auto";
  try { mode = localStorage.getItem("accord-theme") || "auto"; } catch (ignored) {}
  var asked = /[?&]theme=(light|dark)/.exec(location.search);
  if (asked) { mode = asked[1]; }
  function show() {
    if (mode === "auto") { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", mode); }
    var button = document.getElementById("theme");
    if (button) { button.textContent = "Theme: " + mode; }
  }
  show();
  document.addEventListener("DOMContentLoaded", function () {
    var button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", function () {
      mode = order[(order.indexOf(mode) + 1) % order.length];
      try { localStorage.setItem("accord-theme", mode); } catch (ignored) {}
      show();
    });
    show();
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details[data-print]").forEach(function (one) { one.open = true; });
  });
})();
