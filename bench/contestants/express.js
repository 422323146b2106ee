// What many teams write: Express and axios.
import http from 'node:http'
import axios from 'axios'
import express from 'express'

const client = axios.create({ httpAgent: new http.Agent({ keepAlive: true }) })
const app = express()
app.use(express.json())
app.post('/identify', async ({ body }, response) => {
  const event = {
    event: '$identify',
    properties: {
      token: process.env.MIXPANEL_TOKEN, distinct_id: body.identified_id, $identified_id: body.identified_id, $anon_id: body.anon_id
    }
  }
  const { data } = await client.post(`${process.env.MIXPANEL_URL}/track?ip=0`, new URLSearchParams({ data: JSON.stringify(event) }))
  console.log(JSON.stringify({ time: Date.now(), method: 'POST', url: '/identify', status: data === 1 ? 200 : 502 }))
  response.status(data === 1 ? 200 : 502).json({ status: 'accepted' })
})
// As long as Fastify's: between two slots of the load the connections are idle.
app.listen(Number(process.env.PORT)).keepAliveTimeout = 72_000
