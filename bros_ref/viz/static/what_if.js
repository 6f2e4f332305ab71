// The controls of a what-if. A key is the places of the chosen values, "1 0 2"; what the page knows it shows at once.
// `ask` sends a key to a kernel, which answers with `show`; null: there is none, and only what is known can be shown.
function whatIf(root, data, ask) {
  root.dataset.ready = 'yes';
  const inputs = [...root.querySelectorAll('[data-choice]')], known = data.known;
  const [status, picture] = [root.querySelector('[role=status]'), root.querySelector('[data-picture]')];
  let waiting = null, silent = null;
  const chosen = () => inputs.map((input) => input.value).join(' ');
  const show = (key, svg, words) => {
    known[key] = [svg, words];
    if (key !== chosen()) return; // an answer that came after the next question
    clearTimeout(silent);
    status.textContent = words;
    picture.innerHTML = svg;
    picture.style.opacity = 1;
    root.dataset.at = key;
  };
  const update = () => {
    for (const input of inputs) {
      if (input.type !== 'range') continue;
      const text = input.dataset.shown.split('|')[input.value];
      root.querySelector(`[data-value="${input.dataset.choice}"]`).textContent = text;
      input.setAttribute('aria-valuetext', text);
    }
    const key = chosen();
    clearTimeout(waiting);
    clearTimeout(silent);
    if (known[key]) show(key, ...known[key]);
    else {
      picture.style.opacity = 0.3; // it is the picture of the last answer
      status.textContent = root.dataset.gone ? GONE : ask ? 'asking the simulator ...'
        : 'This setting was not asked beforehand: run the cell, and the kernel answers.';
    }
    // A slider on its way is not asked at every value. What is known is asked too: the picture shows later answers.
    if (ask && !root.dataset.gone) {
      waiting = setTimeout(() => {
        if (!known[key]) silent = setTimeout(() => { status.textContent = SILENT; }, PATIENCE_MS);
        ask(key);
      }, 200);
    }
  };
  for (const input of inputs) input.addEventListener('input', update);
  root.dataset.at = chosen();
  return show;
}

// In a running kernel: the page comes from the model, questions and replies go through it.
function live({ model, el }) {
  el.innerHTML = model.get('page');
  const root = el.querySelector('[data-bros-what-if]');
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const show = whatIf(root, data, (key) => { model.set('question', key); model.save_changes(); });
  model.on('change:reply', () => show(...model.get('reply')));
  return whenKernelGoes(model, () => {
    if (root.dataset.gone) return;
    root.dataset.gone = 'yes'; // what was answered so far can still be chosen
    root.querySelector('[role=status]').textContent += ` ${GONE}`;
  });
}

// In a page of its own.
for (const root of document.querySelectorAll('[data-bros-what-if]:not([data-ready])')) {
  whatIf(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent), null);
}
