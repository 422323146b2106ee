// A Mixpanel that answers 1 after LATENCY_MS to at most CONCURRENCY requests at a time, and counts. GET /count: { requests, identities }.
// GET /down: from now on it answers 503. GET /up: no longer.
import { createServer } from 'node:http'

const latency = Number(process.env.LATENCY_MS ?? 0)
const concurrency = Number(process.env.CONCURRENCY ?? Infinity)
let requests = 0
let identities = 0
let busy = 0
let isDown = false
const waiting = []

function serve (response) {
  if (busy >= concurrency) return waiting.push(response)
  busy++
  const end = () => {
    response.end('1')
    busy--
    if (waiting.length > 0) serve(waiting.shift())
  }
  if (latency > 0) setTimeout(end, latency)
  else end()
}

createServer({ keepAliveTimeout: 60_000 }, (request, response) => {
  let body = ''
  request.setEncoding('latin1').on('data', chunk => { body += chunk }).on('end', () => {
    if (request.url === '/count') return response.end(JSON.stringify({ requests, identities }))
    if (request.url === '/down' || request.url === '/up') {
      isDown = request.url === '/down'
      return response.end()
    }
    if (isDown) return response.writeHead(503).end()
    requests++
    identities += Math.max(1, body.split('%24insert_id').length - 1)
    response.setHeader('content-type', 'text/plain')
    serve(response)
  })
}).listen(Number(process.env.PORT), '127.0.0.1')
