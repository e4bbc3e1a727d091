// Draws the page's diagrams, light or dark as the page is, and again when that is changed.
(() => {
  const dark = () => {
    const theme = document.body.dataset.theme;
    return theme === "dark" || (theme !== "light" && window.matchMedia("(prefers-color-scheme: dark)").matches);
  };
  const draw = () => {
    const diagrams = document.querySelectorAll("pre.mermaid");
    for (const diagram of diagrams) {
      diagram.dataset.source ??= diagram.textContent;
      diagram.textContent = diagram.dataset.source;
      delete diagram.dataset.processed;
    }
    mermaid.initialize({ startOnLoad: false, theme: dark() ? "dark" : "default", sequence: { wrap: true, actorMargin: 130 } });
    mermaid.run({ nodes: diagrams });
  };
  document.addEventListener("DOMContentLoaded", () => {
    draw();
    new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] });
  });
})();
