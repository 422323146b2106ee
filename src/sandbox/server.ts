import { createSandbox } from './app.ts'

// The compose file sets HOST to an address that other containers can reach; the default is loopback.
const { HOST = '127.0.0.1', PORT = '8081', SANDBOX_TOKEN = 'sandbox-token' } = process.env

const { app } = createSandbox({ token: SANDBOX_TOKEN })
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => app.close())
const url = await app.listen({ host: HOST, port: Number(PORT) })
console.log(`The sandbox listens on ${url}; its events: ${url}/__sandbox/events`)
