// A kernel that is gone does not answer: what has had no answer for this long gets a hint.
const PATIENCE_MS = 6_000, SILENT = 'No answer yet: the kernel is busy or gone. If the kernel is gone, run the cell again.';
const GONE = 'The kernel is gone: run the cell again.';

// Calls `tell` when the kernel ends or restarts, and returns a function that stops that. JupyterLab and Notebook know
// it from the session; in other front ends a widget learns of a restart at most.
function whenKernelGoes(model, tell) {
  const session = model.widget_manager?.context?.sessionContext;
  const status = (_, now) => { if (['restarting', 'autorestarting', 'terminating', 'dead'].includes(now)) tell(); };
  const changed = (_, { oldValue }) => { if (oldValue) tell(); };
  model.on('comm_live_update', tell);
  session?.statusChanged.connect(status);
  session?.kernelChanged.connect(changed);
  return () => {
    model.off('comm_live_update', tell);
    session?.statusChanged.disconnect(status);
    session?.kernelChanged.disconnect(changed);
  };
}
