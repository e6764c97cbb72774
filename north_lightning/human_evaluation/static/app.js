"use strict";
// Saves a form's answers as they are given, and lets digits choose them. The pages work without it.
const form = document.querySelector("form[data-draft]");
if (form) {
  const status = form.querySelector(".status");
  let waiting = 0, isLeaving = false;

  async function save() {
    clearTimeout(waiting);
    try {
      const answer = await fetch(form.dataset.draft, { method: "POST", body: new URLSearchParams(new FormData(form)) });
      status.textContent = answer.ok ? "Draft saved." : "The draft could not be saved.";
    } catch {
      if (isLeaving) return;
      status.textContent = "The server cannot be reached. Trying again.";
      waiting = setTimeout(save, 3000);
    }
  }
  form.addEventListener("change", save);
  form.addEventListener("input", (event) => {
    if (event.target.name !== "comment") return;
    clearTimeout(waiting);
    waiting = setTimeout(save, 500);
  });
  form.addEventListener("submit", () => { isLeaving = true; clearTimeout(waiting); });

  const questions = [...form.querySelectorAll("fieldset[data-choice]")];
  document.addEventListener("keydown", (event) => {
    if (!/^[0-5]$/.test(event.key) || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "TEXTAREA") return;
    const own = event.target.closest("fieldset[data-choice]") ?? questions.find((one) => !one.querySelector(":checked"));
    const choice = own?.querySelector(`input[value="${event.key}"]`);
    if (!choice) return;
    event.preventDefault();
    choice.checked = true;
    choice.dispatchEvent(new Event("change", { bubbles: true }));
    const next = questions.find((one) => !one.querySelector(":checked"));
    (next?.querySelector("input") ?? form.querySelector("button")).focus();
  });
}
