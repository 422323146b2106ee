import { createSandbox } from './app.ts'

// The compose file gives it the address that other containers reach; by itself it stays on loopback.
const { HOST = '127.0.0.1', PORT = '8081', SANDBOX_TOKEN = 'sandbox-token' } = process.env

const { app } = createSandbox({ token: SANDBOX_TOKEN })
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => app.close())
const url = await app.listen({ host: HOST, port: Number(PORT) })
console.log(`A stand-in for Mixpanel listens on ${url}; what it got: ${url}/__sandbox/events`)
