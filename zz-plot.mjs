import { spawn } from 'node:child_process'
import { writeFileSync, mkdirSync, rmSync } from 'node:fs'
import { chromium } from 'playwright-core'
const dir='/tmp/plot'; rmSync(dir,{recursive:true,force:true}); mkdirSync(dir)
const sleep = ms => new Promise(r => setTimeout(r, ms))
const sandbox = spawn(process.execPath,['dist/sandbox/server.js'],{env:{...process.env,PORT:'18181'},stdio:'ignore'})
const relay = spawn(process.execPath,['dist/server.js'],{env:{...process.env,MIXPANEL_TOKEN:'sandbox-token',MIXPANEL_URL:'http://127.0.0.1:18181',PORT:'18180',METRICS_PORT:'19464',OUTBOX:`file:${dir}/o`,RATE_LIMIT_MAX:'1000000'},stdio:'ignore'})
writeFileSync(`${dir}/p.yml`, JSON.stringify({global:{scrape_interval:'1s'},scrape_configs:[{job_name:'identify-relay',static_configs:[{targets:['127.0.0.1:19464']}]}]}))
const prom = spawn('prometheus',[`--config.file=${dir}/p.yml`,`--storage.tsdb.path=${dir}/d`,'--web.listen-address=127.0.0.1:19090'],{stdio:'ignore'})
await sleep(7000)
const uuid=()=>crypto.randomUUID()
const end=Date.now()+75000; let n=0
const fault=async f=>fetch('http://127.0.0.1:18181/__sandbox/faults',{method:'POST',body:JSON.stringify(f)})
setTimeout(()=>fault([{name:'edge_down',times:100000}]),20000); setTimeout(()=>fetch('http://127.0.0.1:18181/__sandbox/faults',{method:'DELETE'}),50000)
while(Date.now()<end){ await Promise.all(Array.from({length:5},()=>fetch('http://127.0.0.1:18180/identify',{method:'POST',headers:{'content-type':'application/json'},body:JSON.stringify({identified_id:'u'+n++,anon_id:uuid()})}).then(r=>r.arrayBuffer()))); await sleep(50)}
const q=['sum by (outcome) (rate(identify_relay_identities_total[10s]))','identify_relay_outbox_waiting','max(identify_relay_outbox_oldest_seconds)','histogram_quantile(0.95, sum by (le) (rate(identify_relay_http_request_duration_seconds_bucket[10s])))']
const u='http://127.0.0.1:19090/graph?'+q.map((e,i)=>`g${i}.expr=${encodeURIComponent(e)}&g${i}.tab=0&g${i}.range_input=2m`).join('&')
const b=await chromium.launch({executablePath:'/usr/bin/chromium',args:['--no-sandbox']})
const page=await b.newPage({viewport:{width:1100,height:1900}}); await page.goto(u.replace('/graph','/classic/graph')).catch(()=>{}); await sleep(4000)
await page.screenshot({path:'/tmp/plot/graph.png',fullPage:true}); console.log(await page.title(), page.url().slice(0,60))
await b.close(); for (const c of [sandbox,relay,prom]) c.kill('SIGKILL'); process.exit()
