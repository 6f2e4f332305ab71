// Stills behind a slider: one is shown, the others are hidden.
each('frames', (root, data) => {
  const stills = [...root.querySelectorAll('[data-frame]')], status = root.querySelector('[role=status]');
  const show = (at) => {
    stills.forEach((still, i) => { still.hidden = i !== at; });
    status.textContent = `${at + 1} of ${stills.length}: ${data.captions[at]}`;
    root.dataset.step = at;
  };
  show(controls(root, show).value());
});
