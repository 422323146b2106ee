// Takes the picture of the sandbox's page in the documentation: npm run picture
/* global createImageBitmap, OffscreenCanvas */
import { writeFileSync } from 'node:fs'
import { crc32, deflateSync } from 'node:zlib'
import { chromium } from 'playwright-core'
import { createSandbox } from '../dist/sandbox/app.js'

const [, , path = 'docs/sandbox.png', executablePath = '/usr/bin/chromium'] = process.argv
const anonOf = number => `5f0c8a1e-6a0b-4d53-9d3c-${String(number).padStart(12, '0')}`
const time = Math.floor(Date.now() / 1000)
const identify = ([user, anon]) => ({
  event: '$identify',
  properties: { token: 'sandbox-token', distinct_id: user, $identified_id: user, $anon_id: anon, time, $insert_id: `${user}-${anon}` }
})

const sandbox = createSandbox()
const url = await sandbox.app.listen({ host: '127.0.0.1', port: 0 })
const send = (...identities) => fetch(`${url}/track`, {
  method: 'POST', body: new URLSearchParams({ data: JSON.stringify(identities.map(identify)) })
})
await send(['user-42', anonOf(21)], ['user-42', `$device:${anonOf(22)}`])
await send(['ann@example.com', anonOf(31)], ['ann@example.com', anonOf(32)], ['ann@example.com', anonOf(33)])
sandbox.faults.add({ name: 'edge_down' })
await send(['user-43', anonOf(21)])
await send(['user-43', anonOf(21)], ['user-42', anonOf(21)])
sandbox.faults.add({ name: 'rate_limited', times: 2 })

const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] })
const page = await browser.newPage({ viewport: { width: 960, height: 940 }, reducedMotion: 'reduce' })
await page.goto(url)
await page.locator('#rows tr').nth(7).waitFor()
writeFileSync(path, encode(await pixelsOf(await page.screenshot())))
await browser.close()
await sandbox.app.close()

/** Returns the pixels of a PNG, four bytes each. */
async function pixelsOf (png) {
  const page = await browser.newPage()
  const pixels = await page.evaluate(async url => {
    const image = await createImageBitmap(await (await fetch(url)).blob())
    const context = new OffscreenCanvas(image.width, image.height).getContext('2d')
    context.drawImage(image, 0, 0)
    const { data } = context.getImageData(0, 0, image.width, image.height)
    return { width: image.width, height: image.height, data: Array.from(data) }
  }, `data:image/png;base64,${png.toString('base64')}`)
  return { ...pixels, data: Uint8Array.from(pixels.data) }
}

/** Returns a PNG of the 256 most frequent colours, a third the size of a screenshot. */
function encode ({ width, height, data }) {
  const colors = Array.from({ length: width * height }, (_, at) => data[at * 4] << 16 | data[at * 4 + 1] << 8 | data[at * 4 + 2])
  const counts = new Map()
  for (const color of colors) counts.set(color, (counts.get(color) ?? 0) + 1)
  const palette = [...counts.keys()].sort((one, other) => counts.get(other) - counts.get(one)).slice(0, 256)
  const indexes = new Map([...counts.keys()].map(color => [color, nearest(palette, color)]))
  const rows = Buffer.alloc((width + 1) * height)
  colors.forEach((color, at) => { rows[Math.floor(at / width) * (width + 1) + 1 + at % width] = indexes.get(color) })
  const header = Buffer.alloc(13)
  header.writeUInt32BE(width, 0)
  header.writeUInt32BE(height, 4)
  header.set([8, 3, 0, 0, 0], 8)
  return Buffer.concat([
    Buffer.from([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]),
    chunk('IHDR', header),
    chunk('PLTE', Buffer.from(palette.flatMap(partsOf))),
    chunk('IDAT', deflateSync(rows, { level: 9 })),
    chunk('IEND', Buffer.alloc(0))
  ])
}

function nearest (palette, color) {
  const distances = palette.map(other => Math.hypot(...partsOf(color).map((part, index) => part - partsOf(other)[index])))
  return distances.indexOf(Math.min(...distances))
}

function partsOf (color) {
  return [color >> 16, color >> 8 & 255, color & 255]
}

function chunk (type, data) {
  const body = Buffer.concat([Buffer.from(type), data])
  const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)]
  length.writeUInt32BE(data.length)
  sum.writeUInt32BE(crc32(body))
  return Buffer.concat([length, body, sum])
}
