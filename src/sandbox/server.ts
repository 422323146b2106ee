import { createSandbox, SANDBOX_ACCOUNT, SANDBOX_BOUNDS } from './app.ts'
import { isMode } from './ledger.ts'

// The compose file sets HOST to an address that other containers can reach; the default is loopback.
const { HOST = '127.0.0.1', PORT = '8081', SANDBOX_TOKEN = 'sandbox-token', SANDBOX_MODE = 'original' } = process.env
if (!isMode(SANDBOX_MODE)) {
  console.error('SANDBOX_MODE must be original, simplified or legacy.')
  process.exit(1)
}

const { app } = createSandbox({
  token: SANDBOX_TOKEN, mode: SANDBOX_MODE, serviceAccounts: [SANDBOX_ACCOUNT], ...SANDBOX_BOUNDS
})
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => app.close())
const url = await app.listen({ host: HOST, port: Number(PORT) })
console.log(`The sandbox listens on ${url}; open it in a browser. Its events as JSON: ${url}/__sandbox/events`)
