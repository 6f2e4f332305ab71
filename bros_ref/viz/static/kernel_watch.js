// Says so when the kernel goes. Also asks it after every click in the panel around it, and says if there is no answer.
function render({ model, el }) {
  let waiting = null, gone = false;
  el.setAttribute('role', 'status');
  const ask = (event) => {
    if (gone || !el.closest('.widget-vbox')?.contains(event.target)) return;
    waiting ??= setTimeout(() => { el.textContent = SILENT; }, PATIENCE_MS);
    model.set('asked', model.get('asked') + 1);
    model.save_changes();
  };
  model.on('change:answered', () => {
    if (model.get('answered') !== model.get('asked')) return;
    clearTimeout(waiting);
    waiting = null;
    el.textContent = '';
  });
  document.addEventListener('click', ask, true); // before the button's own handler, which may fail without a kernel
  const stop = whenKernelGoes(model, () => {
    gone = true;
    clearTimeout(waiting);
    el.textContent = GONE;
  });
  return () => {
    document.removeEventListener('click', ask, true);
    stop();
  };
}
export default { render };
