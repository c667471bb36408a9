// Browsers start no worker for a page that is a file. The site's search then runs in a hidden frame instead, so that it
// works without a server. (mkdocs-material's offline plugin would take a script of this name from a content network.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.worker = this
      frame.srcdoc = `<script>
        postMessage = data => frameElement.worker.dispatchEvent(new parent.MessageEvent("message", { data }))
        importScripts = (...urls) => Promise.all(urls.map(url => new Promise((done, failed) => {
          const script = document.createElement("script")
          Object.assign(script, { src: url, onload: done, onerror: failed })
          document.head.append(script)
        })))
      </script><script src="${new URL(url, document.baseURI)}"></script>`
      this.ready = new Promise(done => frame.addEventListener("load", () => done(frame.contentWindow)))
      document.body.append(frame)
    }

    postMessage(data) {
      this.ready.then(scope => scope.dispatchEvent(new scope.MessageEvent("message", { data })))
    }
  }
}
