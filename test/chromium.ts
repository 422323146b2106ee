import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { delimiter, join } from 'node:path'
import { chromium, type Browser } from 'playwright-core'
import type { Test } from 'tap'

const executablePath = ['chromium', 'chromium-browser', 'google-chrome-stable', 'google-chrome']
  .flatMap(name => (process.env.PATH ?? '').split(delimiter).map(path => join(path, name))).find(path => existsSync(path))

/** The options of a test that needs Chromium: without it the test is skipped, with the reason. */
export const needsChromium = { skip: executablePath === undefined ? 'chromium is not installed' : false }

/** In which a page must have done what a test waits for. */
export const WAIT_MS = 60_000

/** Chromium for a file of tests, if it is installed. It reaches loopback alone; `outside` gets all other hosts that pages ask for. */
export async function launchChromium (t: Pick<Test, 'teardown'>, outside: string[] = []): Promise<Browser | undefined> {
  if (executablePath === undefined) return undefined
  // All but loopback goes to this proxy, which refuses it. With a route of Playwright instead, Playwright would answer
  // every preflight itself, and would not see requests of a page that unloads.
  const proxy = createServer(({ url = '' }, response) => {
    record(new URL(url).hostname)
    response.writeHead(403).end()
  })
  proxy.on('connect', ({ url = '' }, socket) => {
    record(url.replace(/:\d+$/, ''))
    socket.end('HTTP/1.1 403 Forbidden\r\n\r\n')
  })
  await once(proxy.listen(0, '127.0.0.1'), 'listening')
  t.teardown(() => { proxy.close().closeAllConnections() })
  const { port } = proxy.address() as AddressInfo
  const browser = await chromium.launch({ executablePath, timeout: WAIT_MS, args: ['--no-sandbox', `--proxy-server=http://127.0.0.1:${port}`] })
  t.teardown(() => browser.close())
  return browser

  /** Chromium itself asks for updates, and the like. */
  function record (host: string): void {
    if (!/(?:^|\.)(?:google|googleapis|gstatic|gvt1)\.com$/.test(host)) outside.push(host)
  }
}
